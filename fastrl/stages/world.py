"""The stage that writes the demo's world."""

from fastrl.console import Console
from fastrl.runs import WorldRun
from fastrl.stages.inputs import OpenFolder
from fastrl.world_files import write_world


def world(run: WorldRun, open_folder: OpenFolder, console: Console) -> None:
    """Write text, demonstrations, prompts and tokenizer."""
    with open_folder() as folder:
        write_world(folder.path, run.seed)
        folder.finish()
