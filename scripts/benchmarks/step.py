#!/usr/bin/env python
"""Cells trained on per CPU second, here and in arc-state 0.11.1; on a GPU, MFU of ``model=base``.

scripts/benchmarks/step.py [--quick] [--parts step commands gpu] [--rounds 7] [--steps 120]
    [--command-rounds 3] [--folder DIR] [--json FILE]

Cell = a treated cell of a set; its control cell comes with it. One thread everywhere.

``step``: one process per side, the same 8 sets of 64 control and 64 treated cells of 2,000 genes
(drawn, some 350 non-zeros each), one training step at a time; sides take turns, round by round.
Both have 4 set layers of width 256 with 4 heads and a SwiGLU of 1,024 (arc-state's ratio of 4), one
linear map from and to genes, and keep to fp32. Beyond that each trains its own model with its own
objective: here a summary of 8 further control cells (the share of ``model=small``), an encoded
condition with path time, energy distance, AdamW, moving average of the weights (step_ours.py);
there energy distance and Adam (step_state.py). Two more rows are not the same arithmetic and stand
for themselves: ``own width`` has the SwiGLU of this package's rule (8/3 of the width), ``bf16`` is
``trainer.precision=bf16``.

``commands``: ``scale pretrain`` on a store against ``state tx train`` on the h5ad it was made of,
in turns: the same cells, sizes, sets per step and steps, CPU seconds of the process with its
children, imports and reading included. A second, short run of each gives the share of the start:
the ratio is told as it is at the given number of steps, and per step without the start.

``gpu``: needs CUDA, see step_gpu.py; left out without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import ROOT, environment_python
from machine import describe_machine

if TYPE_CHECKING:
    from worker import Worker

HERE = Path(__file__).resolve().parent
GENES, SETS, SET_SIZE, NUM_PERTURBATIONS = 2_000, 8, 64, 100
WIDTH, LAYERS, HEADS, FFN, OWN_FFN = 256, 4, 4, 1_024, 704
SHORT_STEPS = 10
OURS = {
    "hidden_size": WIDTH,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "ffn_hidden_size": FFN,
    "set_size": SET_SIZE,
    "num_summary_cells": SET_SIZE // 8,
}
THEIRS = {
    "cell_set_len": SET_SIZE,
    "hidden_dim": WIDTH,
    "transformer_backbone_kwargs.num_hidden_layers": LAYERS,
    "transformer_backbone_kwargs.num_attention_heads": HEADS,
    "transformer_backbone_kwargs.num_key_value_heads": HEADS,
    "transformer_backbone_kwargs.head_dim": WIDTH // HEADS,
    "transformer_backbone_kwargs.intermediate_size": FFN,
}
COMMANDS = {"scale": "pretrain", "arc-state": "state_train"}
"""The whole commands, as keys name them."""
STATE, SCALE, OWN_WIDTH, BF16 = "arc-state", "scale", "scale, own width", "scale, bf16"


# --- the step -----------------------------------------------------------------------------------


def write_cells(folder: Path) -> Path:
    """Write the sets that both sides train on."""
    import numpy as np
    from data_sets import SET_A, draw_cells

    num_summary = OURS["num_summary_cells"]
    shapes = {"control_BSG": SET_SIZE, "treated_BSG": SET_SIZE, "summary_BUG": num_summary}
    counts, _ = draw_cells(SET_A.sized(SETS * sum(shapes.values()), 2))
    library_N = np.asarray(counts.sum(1)).ravel()
    values_NG = np.log1p(counts.toarray() * (1e4 / library_N)[:, None]).astype(np.float32)
    arrays, start = {}, 0
    for name, size in shapes.items():
        end = start + SETS * size
        arrays[name], start = values_NG[start:end].reshape(SETS, size, GENES), end
    arrays["perturbation_B"] = np.arange(SETS) * 7 % NUM_PERTURBATIONS
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "step-cells.npz", **arrays)
    return folder / "step-cells.npz"


def start_sides(cells: Path) -> dict[str, Worker]:
    """Start one process per side."""
    from worker import start_readers

    same = {"cells": str(cells), "num_perturbations": NUM_PERTURBATIONS}
    ours = {
        SCALE: {"sizes": OURS, "precision": "fp32"},
        OWN_WIDTH: {"sizes": {**OURS, "ffn_hidden_size": OWN_FFN}, "precision": "fp32"},
        BF16: {"sizes": OURS, "precision": "bf16"},
    }
    readers = {name: ([json.dumps(same | given)], {}) for name, given in ours.items()}
    theirs = {STATE: ([json.dumps(same | {"sizes": THEIRS})], {"CUDA_VISIBLE_DEVICES": ""})}
    workers = start_readers(environment_python("arc_state"), HERE / "step_state.py", theirs)
    return workers | start_readers(sys.executable, HERE / "step_ours.py", readers)


def measure_steps(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Return what a step of each side takes; medians over rounds, the first thrown away."""
    workers = start_sides(write_cells(folder))
    for worker in workers.values():
        worker.wait_until_ready()
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        for name, worker in workers.items():
            answer = worker.ask(steps)
            if number:
                answers[name].append(answer)
    facts = {name: worker.ask(0) for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    rows = {}
    for name, each in answers.items():
        cpu = statistics.median(a["cpu"] / steps for a in each)
        rows[name] = {
            "cells_per_cpu_second": each[0]["cells"] / steps / cpu,
            "cpu_ms_per_step": cpu * 1e3,
            "cpu_ms_per_step_least": min(a["cpu"] / steps for a in each) * 1e3,
            "wall_ms_per_step": statistics.median(a["wall"] / steps for a in each) * 1e3,
            "parameters": facts[name]["parameters"],
            "last_loss": facts[name]["loss"],
            "peak_mib": facts[name]["peak_mib"],
        }
    theirs = rows[STATE]["cells_per_cpu_second"]
    ratios = {name: row["cells_per_cpu_second"] / theirs for name, row in rows.items()}
    print(f"{'step':18s} {'cells/CPU s':>12s} {'ms CPU':>8s} {'parameters':>11s} {'ratio':>6s}")
    for name, row in rows.items():
        print(
            f"{name:18s} {row['cells_per_cpu_second']:12,.0f} {row['cpu_ms_per_step']:8.1f} "
            f"{row['parameters']:11,.0f} {ratios[name]:6.2f}"
        )
    return {
        "ratio_step_vs_state": ratios[SCALE],
        "ratio_step_own_width_vs_state": ratios[OWN_WIDTH],
        "ratio_step_bf16_vs_state": ratios[BF16],
        "cells_per_cpu_second": rows[SCALE]["cells_per_cpu_second"],
        "state_cells_per_cpu_second": theirs,
        "steps": rows,
    }


# --- the whole commands -------------------------------------------------------------------------


def measure_commands(
    folder: Path, rounds: int, steps: int, short_steps: int | None
) -> dict[str, Any]:
    """Return what the whole trainings take, medians over rounds; with a short run, of their start.

    The short run is one more of each side.
    """
    from step_commands import Cost, make_files, our_command, their_command

    files, python = make_files(folder), environment_python("arc_state")

    def both(number: int) -> tuple[Cost, Cost]:
        print(f"pretrain and tx train, {number} steps", file=sys.stderr)
        return (
            our_command(files, folder / "step-scale", OURS, SETS, number),
            their_command(python, files, folder / "step-state", THEIRS, SETS, number),
        )

    costs = [both(steps) for _ in range(rounds)]
    cells = steps * SETS * SET_SIZE
    result: dict[str, Any] = {"command_steps": steps, "command_cells": cells}
    whole = []
    for place, name in enumerate((SCALE, STATE)):
        cpu = statistics.median(pair[place].cpu for pair in costs)
        whole.append(cpu)
        result |= {
            f"{COMMANDS[name]}_cpu_seconds": cpu,
            f"{COMMANDS[name]}_wall_seconds": statistics.median(p[place].wall for p in costs),
            f"{COMMANDS[name]}_cells_per_cpu_second": cells / cpu,
        }
        print(f"{name:10s} {steps} steps: {cpu:6.1f} CPU s, {cells / cpu:7,.0f} cells/CPU s")
    result["ratio_pretrain_vs_state"] = whole[1] / whole[0]
    print(f"the whole command: {whole[1] / whole[0]:.2f} times as many cells per CPU second")
    if short_steps is None:
        return result
    each_step = []
    for cpu, name, cost in zip(whole, (SCALE, STATE), both(short_steps), strict=True):
        per_step = (cpu - cost.cpu) / (steps - short_steps)
        each_step.append(per_step)
        result |= {
            f"{COMMANDS[name]}_cpu_ms_per_step": per_step * 1e3,
            f"{COMMANDS[name]}_start_cpu_seconds": cpu - steps * per_step,
        }
        print(
            f"{name:10s} {per_step * 1e3:.0f} ms CPU a step, {cpu - steps * per_step:.1f} s for "
            "start and end"
        )
    result["ratio_pretrain_vs_state_without_start"] = each_step[1] / each_step[0]
    print(f"without start and end: {each_step[1] / each_step[0]:.2f} times")
    return result


# --- all ----------------------------------------------------------------------------------------


def main() -> None:
    """Run the parts and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("step", "commands", "gpu")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run at all")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=7, help="of the step, 4 steps each")
    parser.add_argument("--steps", type=int, default=120, help="of a whole command")
    parser.add_argument("--command-rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "benchmarks")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    record: dict[str, Any] = {"machine": describe_machine(), "is_quick": arguments.quick}
    if "step" in arguments.parts:
        rounds, steps = (2, 1) if arguments.quick else (arguments.rounds, 4)
        record |= measure_steps(folder, rounds, steps)
    if "commands" in arguments.parts:
        rounds, steps = arguments.command_rounds, arguments.steps
        short: int | None = SHORT_STEPS
        if arguments.quick:
            rounds, steps, short = 1, 10, None
        record |= measure_commands(folder, rounds, steps, short)
    if "gpu" in arguments.parts:
        from step_gpu import measure_gpu

        record |= measure_gpu(folder, quick=arguments.quick)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
