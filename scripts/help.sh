# Sourced by other scripts: -h or --help among their arguments prints the comment at their head and ends them.
for word; do
    case $word in
        -h | --help)
            sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"
            exit
            ;;
    esac
done
