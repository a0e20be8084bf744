"""An adapter folder that this version cannot reproduce is refused by everything that reads one."""

from pathlib import Path

import pytest

from rlhf.adapter.lora_file import ADAPTER_FILE, read_lora
from rlhf.evaluation.generate import Variant
from rlhf.export import export_adapter, export_merged


@pytest.mark.parametrize(
    "read",
    [
        lambda run: export_merged(run, run / "out"),
        lambda run: export_adapter(run, run / "out"),
        lambda run: Variant(lora=run / "adapter").check(),
        lambda run: read_lora(run),
    ],
)
def test_an_adapter_beside_trained_blocks_of_an_older_version_is_refused(tmp_path: Path, read):
    (tmp_path / "adapter").mkdir()
    for file in ("config.yaml", f"adapter/{ADAPTER_FILE}", "adapter/trained_blocks.safetensors"):
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=r"got trained_blocks.*, expected an adapter alone; use that version, or"):
        read(tmp_path)
    assert not (tmp_path / "out").exists()
