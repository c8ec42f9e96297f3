"""Write a data set as tar shards (WebDataset) and as parquet files (Hugging Face), as other people distribute them.

python tests/make_shards.py DATASET DATA_PATH OUTPUT writes OUTPUT/webdataset and OUTPUT/hf from both splits.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHARDS = 3


def labels_of(images, index):
    target = images.targets[index]
    return np.flatnonzero(target).tolist() if np.ndim(target) else int(target)


def shuffled(images):
    """Indices in an order of their own, dealt to shards."""
    return np.array_split(np.random.default_rng(0).permutation(len(images)), SHARDS)


def write_webdataset(folder, images, split):
    """Labels of several classes in .json, others in .cls."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(images.classes))
    for number, indices in enumerate(shuffled(images)):
        with tarfile.open(folder / f"{split}-{number:04d}.tar", "w") as archive:
            for index in indices.tolist():
                path, label = Path(images.names[index]), labels_of(images, index)
                kind, text = ("json", json.dumps({"labels": label})) if isinstance(label, list) else ("cls", str(label))
                for name, content in ((path.name, images.content.read(index)), (f"{path.stem}.{kind}", text.encode())):
                    member = tarfile.TarInfo(f"{path.parent.name}/{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_parquet(folder, images, split):
    import datasets

    datasets.disable_progress_bars()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    kind = datasets.ClassLabel(names=images.classes)
    kind = kind if not isinstance(images.targets, np.ndarray) else datasets.List(kind)
    for number, indices in enumerate(shuffled(images)):
        rows = {"image": [{"bytes": images.content.read(index), "path": Path(images.names[index]).name}
                          for index in indices.tolist()],
                "label": [labels_of(images, index) for index in indices.tolist()]}  # fmt: skip
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        table = datasets.Dataset.from_dict(rows, features=features)
        name = {"val": "validation"}.get(split, split)
        table.to_parquet(folder / "data" / f"{name}-{number:05d}-of-{SHARDS:05d}.parquet")


if __name__ == "__main__":
    from data_sets.table import build_splits

    name, root, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for split, images in zip(("train", "val"), build_splits(name, root, None, allow_subset=True), strict=False):
        write_webdataset(output / "webdataset", images, split)
        write_parquet(output / "hf", images, split)
