"""Write the student of a complete checkpoint as a Hugging Face folder.

    python launch/export_hf.py --run runs/NAME [--checkpoint runs/NAME/checkpoints/step_00001000] [--output FOLDER]

Works for any ZeRO stage and number of ranks, on one CPU. The export is read back and its logits compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.log import run_main, setup


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="the run's folder")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint's folder (default: the best, or the newest)")
    parser.add_argument("--output", type=Path, help="where to write (default: RUN/export)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights written")
    parser.add_argument("--pth", action="store_true", help="write checkpoint.pth beside it: the state dict alone")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx beside it, for onnxruntime")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    setup(rank=0)
    from engine.checkpoint import best, read_meta
    from engine.finish import export_run, load_student
    from engine.report import Results
    from engine.runfolder import read_config
    from engine.staging import newest_stage

    folder = newest_stage(arguments.run)
    config = read_config(folder)
    checkpoint = arguments.checkpoint or best(folder / "checkpoints")
    read_meta(checkpoint)
    student = load_student(folder, checkpoint, config.task.kind)
    results = Results.load(folder) if arguments.checkpoint is None else None
    output = export_run(student, folder, arguments.output or arguments.run / "export", config, results, arguments.dtype)
    if arguments.pth:
        import torch

        torch.save(student.state_dict(), output / "checkpoint.pth")
    if arguments.onnx:
        from engine.onnx_export import export_onnx

        export_onnx(student, output)
    return 0


if __name__ == "__main__":
    run_main(main)
