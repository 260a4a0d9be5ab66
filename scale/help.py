"""The words of ``scale --help`` and ``scale <task> --help``, for somebody who meets it today.

Apart from ``cli`` because it is text. A test holds each setting, default and example against the
composed settings, so that the help cannot promise what does not exist.
"""

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of a help text: the key, its default as it is typed, and what it means."""

    key: str
    default: str | None
    text: str


@dataclass(frozen=True, slots=True)
class TaskHelp:
    """What a newcomer needs to know of a task."""

    summary: str
    what: str
    settings: tuple[Setting, ...]
    examples: tuple[str, ...]
    output: str


_TRAINING = (
    Setting("data.store", "data/toy", "directory or address (https://...) of the store"),
    Setting("data.split", "null", "what is held out: TOML file, or a name as tahoe100m_fewshot"),
    Setting("trainer", "cpu", "cpu or gpu: steps, sets per step, precision, device"),
    Setting("trainer.max_steps", "500", "optimizer steps; a higher number continues a run"),
    Setting("trainer.sets_per_batch", "12", "cell sets per optimizer step, over all ranks"),
)
_LOG = Setting("log", "none", "none, offline or online: metrics also to Weights & Biases")

TASKS: dict[str, TaskHelp] = {
    "demo": TaskHelp(
        "the whole road on simulated cells, in a few minutes on a laptop",
        "Simulates a drug screen with known truth, prepares a store, pretrains a tiny model, "
        "finetunes it to two cell lines it has not seen, predicts their held-out drugs and judges "
        "the predictions against baselines and the noise of the data. Started again, it goes on "
        "where it stopped.",
        (
            Setting("steps", "500", "optimizer steps of the pretraining"),
            Setting("finetune_steps", "100", "optimizer steps of the finetuning"),
            Setting("seed", "0", "of the simulation and the training"),
            Setting("name", "demo", "the result stands in runs/<name>"),
        ),
        ("scale demo", "scale demo steps=50 finetune_steps=20 name=quick"),
        "runs/demo/report/report.html and runs/demo/summary.json",
    ),
    "prepare": TaskHelp(
        "h5ad, parquet or SCDL files into a store, the form training reads",
        "Reads counts, picks genes, groups the cells by what was done to them, and writes a "
        "compact, checksummed store. The matrix must hold counts, or log1p values from which "
        "they can be recovered exactly. Cells it cannot use are counted and reported by reason. "
        "Input may be larger than memory; a prepare that was killed goes on where it stopped. "
        "The same command checks (verify), joins (merge) and exports stores.",
        (
            Setting("source", "synthetic", "synthetic, h5ad, tahoe_parquet, scdl or store"),
            Setting("source.files", "[]", "path or pattern of the files, or a list"),
            Setting("store", "data/toy", "directory to write"),
            Setting("columns.perturbation", "drug", "column of .obs: what was done to a cell"),
            Setting("columns.cell_type", "cell_line", "column of .obs: cell type or cell line"),
            Setting("columns.batch", "plate", "column of .obs: plate or replicate, if any"),
            Setting("control", "DMSO_TF", "label of untreated cells in the perturbation column"),
            Setting("genes", "hvg", "hvg (genes.num=2000), all, or list (genes.file=FILE)"),
            Setting("counts", "auto", "where the counts are: auto, X, layers/NAME, raw/X"),
            Setting("num_workers", "null", "processes; null = one per core"),
        ),
        (
            "scale prepare",
            "scale prepare source=h5ad source.files='plates/*.h5ad' store=data/mine "
            "columns.perturbation=drug columns.cell_type=cell_line control=DMSO",
            "scale prepare source=tahoe_parquet source.files='data/*.parquet' "
            "source.metadata=metadata store=data/tahoe",
            "scale prepare verify=data/mine",
            "scale prepare store=data/mine export=mine.h5ad",
            "scale prepare merge=[data/a,data/b] store=data/c",
        ),
        "a directory: the store",
    ),
    "features": TaskHelp(
        "what is known of perturbations beside their names, as a file for training",
        "Makes vectors by name: Morgan fingerprints of SMILES, labels as mechanism and target, "
        "or ready numbers such as embeddings of genes. A model that is trained with them "
        "(data.perturbation_features=FILE) also predicts perturbations it has never seen.",
        (
            Setting("input", None, ".csv, .tsv or .npz; must be given"),
            Setting("name_column", "name", "column with the names, as the store has them"),
            Setting("smiles_column", "null", "column with SMILES (needs RDKit)"),
            Setting("label_columns", "[]", "columns with labels; without both, all are numbers"),
            Setting("label_separator", "null", "text between several labels; null = one each"),
            Setting("like", "null", "file made before, whose labels and sizes to keep"),
            Setting("name", "features", "features.npz stands in runs/<name>"),
            Setting("overwrite", "false", "replace an output that is there"),
        ),
        (
            "scale features input=drugs.csv name_column=drug smiles_column=smiles "
            "label_columns=[mechanism]",
            "scale features input=gene_embeddings.npz",
            "scale features input=new_drugs.csv name_column=drug smiles_column=smiles "
            "label_columns=[mechanism] like=runs/features/features.npz name=new",
        ),
        "runs/<name>/features.npz",
    ),
    "pretrain": TaskHelp(
        "train a model from scratch on a store",
        "Trains a model to turn a set of control cells into the set of perturbed cells. A run is "
        "its name: the same name and settings go on from the last checkpoint, other settings under "
        "the same name are refused. Runs on a CPU, one GPU, or many under torchrun or Slurm.",
        (
            Setting("model", "tiny", "size: tiny, small, base, large, xl"),
            Setting("data", "toy", "toy, mine, tahoe, replogle, pbmc: store and split"),
            *_TRAINING,
            Setting("parallel", "data", "data, or tensor2 (two ranks share each layer)"),
            _LOG,
            Setting("name", "tiny-toy", "the run stands in runs/<name>; default <model>-<data>"),
        ),
        (
            "scale pretrain",
            "scale pretrain model=small data.store=data/mine data.split=split.toml trainer=gpu "
            "name=mine",
        ),
        "runs/<name>/: config.yaml, metrics.jsonl, checkpoints/, export/",
    ),
    "finetune": TaskHelp(
        "go on from a trained model on another store or split",
        "Starts from the weights of a run and trains them on other data. Names the model has not "
        "seen (drugs, cell types) get rows of their own. The sizes of the model are the run's.",
        (
            Setting("start_from", None, "run directory or checkpoint; must be given"),
            *_TRAINING,
            Setting("freeze_encoder", "false", "leave the part that reads single cells as it is"),
            Setting("replace_genes", "false", "use the store's genes instead of the model's"),
            Setting("name", "finetune-toy", "the run stands in runs/<name>"),
        ),
        (
            "scale finetune start_from=runs/tiny-toy",
            "scale finetune start_from=runs/base-tahoe data.store=data/mine data.split=split.toml "
            "name=mine",
        ),
        "runs/<name>/: config.yaml, metrics.jsonl, checkpoints/, export/",
    ),
    "predict": TaskHelp(
        "perturbed cells from control cells, as h5ad",
        "Applies a trained model: to the control cells of an h5ad (input=), or to the held-out "
        "conditions of a store (store=), one of the two. No perturbed cell is needed. Genes are "
        "matched by name. A perturbation that was not in the training needs its features "
        "(perturbation_features=FILE of scale features) and a model trained with such.",
        (
            Setting("checkpoint", None, "run directory or its export folder; must be given"),
            Setting("input", "null", "h5ad with control cells"),
            Setting("store", "null", "store whose held-out conditions are predicted"),
            Setting("perturbations", "[]", "labels to simulate; [] = all that the model knows"),
            Setting("perturbation_key", "null", "column of .obs; null = as in training"),
            Setting("cell_type_key", "null", "column of .obs; null = as in training"),
            Setting("control", "null", "label of the control; null = as in training"),
            Setting("cells_per_condition", "null", "null = as many as observed, or its controls"),
            Setting("name", "predict", "predicted.h5ad stands in runs/<name>"),
            Setting("overwrite", "false", "replace an output that is there"),
        ),
        (
            "scale predict checkpoint=runs/mine store=data/mine",
            "scale predict checkpoint=runs/mine input=cells.h5ad 'perturbations=[drug A,drug B]'",
            "scale predict checkpoint=runs/mine input=cells.h5ad 'perturbations=[new drug]' "
            "perturbation_features=runs/new/features.npz",
        ),
        "runs/<name>/predicted.h5ad: log1p values, with the controls",
    ),
    "evaluate": TaskHelp(
        "judge predictions against observed cells, baselines and noise",
        "Compares predicted with observed cells, condition by condition, and puts simple baselines "
        "and the agreement of the data with itself beside the model. Any model can be judged: the "
        "predictions are an h5ad of log1p values.",
        (
            Setting("predicted", None, "h5ad, or METHOD=h5ad, or a list; must be given"),
            Setting("observed", None, "h5ad or store with the observed cells; must be given"),
            Setting("train", "null", "h5ad or store with training cells, for the baselines"),
            Setting("split", "null", "TOML file; with a store, says which conditions are scored"),
            Setting("perturbation_key", "null", "column of .obs; null = as the store has it"),
            Setting("cell_type_key", "null", "column of .obs; null = as the store has it"),
            Setting("control", "null", "label of the control; null = as the store has it"),
            Setting("batch_key", "null", "plate whose own controls a condition is compared with"),
            Setting("protocol", "strict", "strict, or cell_eval for numbers equal to cell-eval"),
            Setting("name", "evaluate", "the report stands in runs/<name>"),
        ),
        (
            "scale evaluate predicted=runs/predict/predicted.h5ad observed=data/mine "
            "split=split.toml",
            "scale evaluate 'predicted=[ours=a.h5ad,theirs=b.h5ad]' observed=observed.h5ad "
            "perturbation_key=drug cell_type_key=cell_line control=DMSO",
        ),
        "runs/<name>/report.html, scores.csv, aggregate.csv",
    ),
    "info": TaskHelp(
        "versions and devices; size of a model; what a store or a run holds",
        "Says what is installed, where it would compute and why. With model=, counts the "
        "parameters of a preset; with store=, run= or split=, describes one; with store= and "
        "split=, compares them. Writes nothing.",
        (
            Setting("model", "null", "preset to count: tiny, small, base, large, xl"),
            Setting("num_genes", "2000", "genes the preset is counted with"),
            Setting("store", "null", "directory of a store"),
            Setting("split", "null", "TOML file or name of a split that ships"),
            Setting("run", "null", "directory of a run"),
        ),
        (
            "scale info",
            "scale info model=base store=data/toy",
            "scale info store=data/tahoe split=tahoe100m_fewshot",
        ),
        "nothing but what it prints",
    ),
}


def overview() -> str:
    """Return the text of ``scale --help``."""
    tasks = "\n".join(f"  {name:<10}{task.summary}" for name, task in TASKS.items())
    return f"""\
usage: scale TASK [group=option ...] [key=value ...]

Train, apply and judge virtual-cell models: control cells and a perturbation in,
perturbed cells out.

tasks
{tasks}

first steps
  scale demo                      all of it on simulated cells, with a report at the end
  scale prepare && scale pretrain the same in single steps
  scale TASK --help               what a task does and the settings that matter
  scale TASK --cfg job            every setting of a task with its value
  scale --version

Stores stand in data/ (SCALE_DATA), runs in runs/ (SCALE_RUNS).
"""


def task_help(name: str) -> str:
    """Return the text of ``scale <task> --help``."""
    task = TASKS[name]
    width = max(len(_typed(setting)) for setting in task.settings) + 2
    settings = "\n".join(f"  {_typed(s):<{width}}{s.text}" for s in task.settings)
    examples = "\n".join(f"  {example}" for example in task.examples)
    return f"""\
usage: scale {name} [group=option ...] [key=value ...]

{textwrap.fill(task.what, 88)}

settings that matter, with their defaults
{settings}

examples
{examples}

result: {task.output}

All settings: scale {name} --cfg job (one section of them: --cfg job --package SECTION).
Several values, one run each: scale {name} -m key=1,2,3. Own yaml files: --config-dir DIR.
"""


def _typed(setting: Setting) -> str:
    return f"{setting.key}={'...' if setting.default is None else setting.default}"
