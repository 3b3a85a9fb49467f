"""What measures a GPU runs: each bench on small sizes, with a GPU that is only pretended."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from helpers.pretend_gpu import pretended

BENCHES = Path(__file__).parents[2] / "bench" / "gpu"


@pytest.fixture
def bench(monkeypatch):
    """Loads one; the last line that it prints is its result."""
    monkeypatch.syspath_prepend(str(BENCHES))

    def load(name: str):
        for module in ("device", "rivals", "harness", name):
            sys.modules.pop(module, None)
        module = __import__(name)
        device = sys.modules["device"]
        monkeypatch.setattr(device, "COPY_BYTES", 1 << 10)
        monkeypatch.setattr(device, "PRODUCT_SIZE", 16)
        return module

    yield load
    for module in ("device", "rivals", "harness"):
        sys.modules.pop(module, None)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("path", sorted(BENCHES.glob("bench_*.py")), ids=lambda path: path.stem)
def test_without_a_gpu_each_says_what_is_missing(bench, path, monkeypatch):
    bench("device")
    monkeypatch.setattr(sys, "argv", [path.name])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code.startswith("--device cuda: ") and "\n" not in ended.value.code


def test_attention(bench, capsys, monkeypatch):
    module = bench("bench_attention")
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "DIM": 64}.items():
        monkeypatch.setattr(module, name, value)
    with pretended():
        context = module.cuda.ExecutionContext()
        found = {"decode": module.decode(context, 3, 40), "prefill": module.prefill(context, 50)}
    assert all(own["us"] > 0 and own["flashinfer_us"] == "not installed" for own in found.values())


def test_sampling(bench, capsys, monkeypatch):
    module = bench("bench_sampling")
    monkeypatch.setattr(module, "ROWS", 3)
    monkeypatch.setattr(module, "VOCAB", 300)
    with pretended():
        module.main()
    assert last_line(capsys)["wrong"] <= 1


def test_products(bench, capsys, monkeypatch):
    module = bench("bench_products")
    monkeypatch.setattr(module, "SHAPES", {"qkv": (48, 64)})
    monkeypatch.setattr(sys, "argv", ["bench_products.py", "--rows", "1", "20"])
    with pretended(), pytest.raises(SystemExit, match="False"):
        module.main()
    found = last_line(capsys)
    products = found["products"]
    assert found["least_rows"] in (None, 1, 20)
    assert set(products) == {"qkv x1", "qkv x20"}
    for found in products.values():
        assert all("us" in own for name, own in found.items())


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1: (5, 9), 64: (5, 4), 4096: (50, 30)}, 64),
        ({1: (5, 4), 64: (5, 9), 4096: (50, 30)}, 4096),
        ({1: (5, 4), 64: (5, 4), 4096: (50, 60)}, None),
        ({1: (5, 4), 64: (5, None)}, None),
        ({1: (5, 4), 64: (5, 4)}, 1),
    ],
)
def test_fp8s_product_is_chosen_by_its_table(bench, times, expected):
    """The last number of rows from which torch's is faster throughout; where it does not run it is not."""
    module = bench("bench_products")
    table = {
        f"{shape} x{count}": {
            "fp8": {"us": ours},
            "scaled_mm": {"refused": "so"} if theirs is None else {"us": theirs},
        }
        for shape in module.SHAPES
        for count, (ours, theirs) in times.items()
    }
    assert module.least_rows(table, list(times)) == expected


def test_pages_for_flashinfer(bench):
    """Ends, numbers and last lengths of pages, by hand."""
    rivals, attention = bench("rivals"), bench("bench_attention")
    with pretended():
        plan = attention.make_plan([1, 1, 1], [16, 17, 3])
        ends, pages, last = rivals._pages(plan, 16)
    assert ends.tolist() == [0, 1, 3, 4] and last.tolist() == [16, 1, 3]
    tables = plan.block_tables.tolist()
    assert pages.tolist() == [tables[0][0], *tables[1][:2], tables[2][0]]
