"""Include a model in the image: `python bake_model.py FOLDER [MODEL]`, run by the Dockerfile.

The model is downloaded to the folders set by LIGHTWELL_CACHE and HF_HOME. FOLDER gets a link to it, and a config.yaml
that makes it the default model; without MODEL, that file is empty.
"""

import json
import sys
from pathlib import Path

from server.model_paths import ModelError, resolve_model


def bake(folder: Path, model: str) -> None:
    """Download `model` and make it the default. Raises ModelError."""
    folder.mkdir(parents=True, exist_ok=True)
    config = ""
    if model:
        resolved = resolve_model(model, shows_progress=True)
        link = folder / resolved.name  # the last part of a path is the model's name in the API
        link.symlink_to(resolved.path)
        config = f"model: {json.dumps(str(link))}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    try:
        bake(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
    except ModelError as error:
        sys.exit(f"bake_model: {error}")
