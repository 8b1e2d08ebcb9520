"""transformers knows the loader in whatever order the two are imported, and the command line waits for neither."""

import subprocess
import sys

import pytest

SAYS = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known
import sys
registry = sys.modules["transformers.quantizers.auto"]
print(known["lrcompress"].__name__, type(registry.__spec__.loader).__name__, type(registry.__loader__).__name__)
"""


def printed(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("first", ["import lrcompress, lrcompress", "import transformers; import lrcompress"])
def test_the_loader_is_registered_in_any_order(first: str):
    assert printed(first + SAYS) == "LowRankConfig SourceFileLoader SourceFileLoader"


def test_the_command_line_imports_nothing_heavy_for_its_help():
    code = """
import sys
from click.testing import CliRunner
from lrcompress.cli import cli
result = CliRunner().invoke(cli, ["--help"])
assert result.exit_code == 0 and "run" in result.output
heavy = ("torch", "transformers", "numpy", "pydantic", "huggingface_hub", "rich")
print([name for name in heavy if name in sys.modules])
"""
    assert printed(code) == "[]"
