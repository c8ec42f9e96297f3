"""What is aggregated: how rules weigh the patches of one encoder, and whether that localises objects. Table 6, Figures
7 to 9 and Table 8.

Rules are fixed (--rules), or the trained probes of a main_linprobe.py run (--probes), whose encoder is used unless
--finetune is given. `<output_dir>/aggregation.json` holds the entropy of each rule's vector, divergences of pairs of
rules, and with --boxes MaxBoxAccV2; the figures are kl, maps and boxes. Under torchrun, processes share the images.

examples:
    # everything: fixed rules, an oracle, the probes of a run, and localisation
    python main_analyze_aggregation.py --data_path $IMAGENET --probes runs/mae_base --oracle dino_vit_base_patch16 \\
        --boxes $IMAGENET/LOC_val_solution.csv --output_dir runs/aggregation

    # rules without parameters, on 1,000 images
    python main_analyze_aggregation.py --data_path $IMAGENET --finetune mae_vit_base_patch16 \\
        --rules attn-mn attn-lcte pos ca2 --num_images 1000 --output_dir runs/rules
"""

import argparse
from pathlib import Path

from aggregation import DEFAULT_RULES, KL_FLOOR
from aggregation.boxes import BOX_SOURCES
from cli.arguments import add_data_arguments, add_run_arguments
from cli.console import Parser, inner_share, non_negative_int, positive_int, share_below_one
from cli.encoder_arguments import add_encoder_arguments, add_oracle_arguments


def get_args_parser() -> Parser:
    parser = Parser(__doc__)
    add_encoder_arguments(parser)
    add_data_arguments(parser, labels=False)
    add = parser.add_argument_group("rules").add_argument
    add("--probes", type=Path, metavar="RUN", help="run of main_linprobe.py; without --finetune, its encoder is used")
    add("--probe_heads", nargs="+", metavar="HEAD", help="use only the probes of these heads (default: all)")
    usable = f"those of {', '.join(DEFAULT_RULES)} that the encoder supports"
    add("--rules", nargs="+", metavar="HEAD", help=f"heads without parameters, on the last block (default: {usable})")
    add_oracle_arguments(parser.add_argument_group("oracle"), default=None)

    add = parser.add_argument_group("analysis").add_argument
    add("--num_images", type=positive_int, help="size of a random subset of the images (default: all)")
    add("--batch_size", default=64, type=positive_int, help="images per process")
    add("--kl_direction", choices=["row_col", "col_row"], default="row_col", help="KL(row || col) or KL(col || row)")
    add("--kl_eps", default=KL_FLOOR, type=share_below_one, metavar="EPS", help="clamp weights to it first; 0: do not")
    add("--images", nargs="+", default=[], metavar="FILE", help="images in the figures (default: a random choice)")
    add("--num_examples", default=5, type=non_negative_int, help="images in the figures without --images; 0: none")

    add = parser.add_argument_group("localisation").add_argument
    sources = "; ".join(source.description for source in BOX_SOURCES.values())
    views = "stretch the whole image, in a pass of its own; or central crop and clipped boxes"
    add("--boxes", type=Path, metavar="SOURCE", help=f"true boxes: {sources}")
    add("--box_format", choices=list(BOX_SOURCES), help="of --boxes (default: detected)")
    add("--boxes_only", action="store_true", help="no entropies and divergences")
    add("--loc_transform", choices=["resize", "crop"], default="resize", help=views)
    add("--loc_step", default=0.001, type=inner_share, help="distance of the thresholds")
    add("--loc_map_heads", choices=["mean", "best"], default="mean", help="best: also each head's [cls] attention")
    add("--loc_workers", type=non_negative_int, help="processes that evaluate maps; 0: none (default: one per core)")
    add("--draw_threshold", type=share_below_one, metavar="T", help="of boxes in the figure (default: best at IoU 0.5)")
    add_run_arguments(parser, trains=False)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other; ValueError."""
    if args.probe_heads is not None and args.probes is None:
        raise ValueError("--probe_heads selects probes of a run: name it with --probes")
    if args.boxes is None:
        needing = {"--boxes_only": args.boxes_only, "--box_format": args.box_format}
        needing |= {"--draw_threshold": args.draw_threshold is not None}
        needing |= {"--loc_map_heads best": args.loc_map_heads == "best"}
        if given := [flag for flag, value in needing.items() if value]:
            raise ValueError(f"{given[0]} needs true boxes: name them with --boxes")
    elif not args.boxes.exists():
        raise ValueError(f"--boxes {args.boxes}: no such file or folder")
