"""Tables and pictures of the communication benchmarks, from results that are made up."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
import comm_tables  # noqa: E402
import timeline_picture  # noqa: E402

PP2 = "pp2_vpp2, C=2560, n=4, megatron"
REPORT = {
    "device": "a GPU",
    "links": "GPU0 GPU1",
    "rows": [
        {
            "section": "parity",
            "name": "pp2, dense, n=1, megatron",
            "loss": 0.0,
            "gradients": 2e-6,
            "ok": True,
        },
        {
            "section": "parity",
            "name": "pp2, dense, n=4, megatron",
            "loss": 1e-7,
            "gradients": 3e-6,
            "ok": True,
        },
        {"section": "parity", "name": "ep2, moe, n=4, -", "failed": "the run ended in its midst"},
        {"section": "measure", "name": PP2, "step": 350.4, "simulated": 341.0},
        {"section": "profile", "name": PP2, "compute": 300.0, "exposed p2p": 41.5},
        {"section": "resume", "name": "rank 1 killed", "exit": 1, "ok": True, "messages": ["Signal 9"]},
    ],
}
PIPELINE = {
    "device": "a GPU",
    "arguments": {"pp": 4},
    "link": {"turns": {"normal": "stream"}, "asked": [1, 2]},
    "runs": {
        "fused whole": {
            "step": 450.0,
            "hidden": 0.987,
            "simulated / measured": 0.96,
            "other models": {
                "links apart": 315.0,
                "host ahead": 405.0,
                "neither": 270.0,
                "without messages": 399.0,
                "without both": 360.0,
            },
            "without messages": 420.0,
            "without both": 400.0,
            "one step's messages": [440.0, 418.0],
            "replayed": [500.0, 505.0],
            "combine end to post end": {"median": 0.31, "p95": 0.4},
            "combine end to post end, normal priority": {"median": 2.5, "p95": 3.0},
        },
        "fused split": {"failed": "Traceback\n  line\ntorch.OutOfMemoryError: CUDA"},
    },
}


def lines(tmp_path, capsys, report):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    comm_tables.main([str(path)])
    return capsys.readouterr().out.splitlines()


def test_tables_of_several_gpus(tmp_path, capsys):
    found = lines(tmp_path, capsys, REPORT)
    assert "| pp2, dense | megatron | 2 | 1.0e-07 | 3.0e-06 | yes |" in found
    assert "| ep2, moe | - | 1 | - | - | **no** |" in found
    (measured,) = (line for line in found if line.startswith(f"| {PP2}"))
    assert [cell.strip() for cell in measured.split("|")][2:4] == ["350", "341"] and " 41.5 |" in measured
    assert any("Signal 9" in line for line in found)


def test_tables_of_one_rank(tmp_path, capsys):
    found = lines(tmp_path, capsys, PIPELINE)
    assert any(line.startswith("| fused whole | 450 |") and " 0.987 |" in line for line in found)
    assert any(line.endswith("| torch.OutOfMemoryError: CUDA |") for line in found)
    assert "| normal priority | 2.5 | 3 |" in found
    assert "| fused whole | 0.96 | 0.7 | 0.9 | 0.6 | 0.95 | 0.9 |" in found
    assert "| fused whole | 0.95 | 1.01 |" in found  # of one noted step
    assert len([line for line in found if line.startswith("| fused split")]) == 1  # it failed
    assert 'link: `{"turns": {"normal": "stream"}}`' in found


def test_a_trace_becomes_a_picture(tmp_path):
    def event(name, start, end, stream, cat="kernel"):
        return {
            "ph": "X",
            "cat": cat,
            "name": name,
            "ts": start,
            "dur": end - start,
            "args": {"stream": stream},
        }

    events = [
        event("nvjet_tst_128x256", 0, 4000, 7),
        event("_post_res_kernel", 4000, 5000, 7),
        event("Memcpy HtoD", 1000, 6000, 20, "gpu_memcpy"),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
    ]
    bars = timeline_picture.trace_bars(events)
    expected = [("stream 7", 0, 4, "kernel"), ("stream 7", 4, 5, "mHC"), ("stream 20", 1, 6, "copy")]
    assert bars == expected
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    timeline_picture.draw_trace(tmp_path / "trace.json", tmp_path / "trace.png", "a step", part=0.9)
    assert (tmp_path / "trace.png").stat().st_size > 3000
