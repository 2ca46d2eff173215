from megatron_mhc.recompute.estimate import main

main()
