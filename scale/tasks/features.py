"""``scale features``: vectors by name of a perturbation, for training and for what is new.

scale features input=drugs.csv name_column=drug smiles_column=smiles label_columns=[mechanism]
scale features input=gene_embeddings.npz                 # arrays names and vectors
"""

from pathlib import Path

from scale.config import FeaturesConfig, to_yaml
from scale.data.feature_source import make_features
from scale.runtime import RunRecord, World, start_logging


def run(config: FeaturesConfig) -> int:
    """Write ``features.npz`` and return the exit status."""
    run_dir, world = Path(config.run_dir), World(0, 1, 0)
    output = Path(config.output) if config.output else run_dir / "features.npz"
    if output.exists() and not config.overwrite:
        raise FileExistsError(f"{output} exists; give another name=, or overwrite=true")
    start_logging(run_dir / "features.log", world)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    record = RunRecord(run_dir, world, {"input": config.input})
    table = make_features(config)
    table.write(output)
    record.close("done", num_names=len(table.names), features_sha256=table.sha256)
    print(f"{output}: {table.describe()}")
    return 0
