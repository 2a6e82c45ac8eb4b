"""The figures of docs/quantization.md are the committed measurements, to the letter."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASUREMENTS = ROOT / "benchmarks/results/quantization.csv"


def test_the_tables_of_the_page_are_made_from_the_committed_csv():
    spec = spec_from_file_location("measure_quantization", ROOT / "scripts/measure_quantization.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.tables(MEASUREMENTS) in (ROOT / "docs/quantization.md").read_text()
