"""`data prepare`: what can be made of official downloads that are on this disk; nothing is fetched."""

import argparse
import json
from typing import TYPE_CHECKING

from delo_llava.commands.base import say
from delo_llava.errors import DeloError
from delo_llava.files import user_path

if TYPE_CHECKING:
    from delo_llava.data_tools.prepared import Preparation

#: Kinds of texts; `data_tools.prepare_text.KINDS` says how each is read.
KINDS = ("coco", "ocr", "hints", "map")


def arguments(parser: argparse.ArgumentParser) -> None:
    """One word for each thing that can be prepared."""
    words = parser.add_subparsers(required=True, metavar="what", dest="what")
    food = words.add_parser("food101_cmml", help="CMML JSON of UPMC Food-101: images/, texts/*.csv")
    food.add_argument("--val", type=float, default=0.1, help="share of training images for validation")
    words.add_parser("mm_imdb_cmml", help="CMML JSON of MM-IMDb: dataset/*.{json,jpeg}, split.json")
    side = words.add_parser("side", help="a side file {key: text} of captions, OCR tokens or hints")
    join = words.add_parser("join", help="records with captions, OCR tokens or hints as their context")
    join.add_argument("--side", type=user_path, required=True, metavar="FILE", help="the texts")
    for one in (side, join):
        one.add_argument("--kind", choices=KINDS, required=True, help="what the texts are")
    sub = words.add_parser("sub", help="a data root with a share of every training file")
    sub.add_argument("recipe", help="a recipe's name or file")
    sub.add_argument("--sub", type=float, required=True, help="share, as --data.sub")
    links = words.add_parser("links", help="links under the other known name: val.json, test.json")
    for one in (food, words.choices["mm_imdb_cmml"], side, join, sub, links):
        one.add_argument("--from", type=user_path, required=True, dest="source", metavar="PATH")
        one.add_argument("--to", type=user_path, required=True, dest="target", metavar="PATH")
        one.add_argument("--force", action="store_true", help="write over files that are there")
    for one in (food, words.choices["mm_imdb_cmml"], sub):
        one.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.set_defaults(data=run)


def run(options: argparse.Namespace) -> int:
    """Prepare, then tell counts and notes; 0 also when it was done before."""
    from delo_llava.data_tools.prepared import Preparation

    shares = [getattr(options, name) for name in ("val", "sub") if hasattr(options, name)]
    if not all(0 <= share <= 1 for share in shares):
        raise DeloError("A share is a number from 0 to 1.", given=shares)
    if not options.source.exists():
        raise DeloError("There is nothing to prepare from.", given=options.source)
    named = ("val", "sub", "seed", "kind", "recipe")
    chosen = {name: getattr(options, name) for name in named if hasattr(options, name)}
    made = Preparation(options.what, options.target.absolute(), chosen, options.force)
    if _prepare(options, made):
        say(f"{json.dumps(made.counts)}\n")
        say("".join(f"{note}\n" for note in made.notes))
        say(f"written: {made.target}; what it was made of: {made.manifest}\n")
    else:
        say(f"done before, from the same sources: {made.target}\n")
    return 0


def _prepare(options: argparse.Namespace, made: "Preparation") -> bool:
    """Do it; whether there was anything to do."""
    from delo_llava.data_tools import prepare_cmml, prepare_root, prepare_text

    source = options.source.absolute()
    match options.what:
        case "food101_cmml":
            return prepare_cmml.food101(source, made, options.seed, options.val)
        case "mm_imdb_cmml":
            return prepare_cmml.mm_imdb(source, made, options.seed)
        case "side":
            return prepare_text.side_file(source, options.kind, made)
        case "join":
            return prepare_text.join(source, options.side, options.kind, made)
        case "sub":
            from delo_llava.data.recipe import load_sequence

            sequence = load_sequence(options.recipe, source)
            return prepare_root.sub_sample(sequence, source, made, options.sub, options.seed)
        case _:
            return prepare_root.aliases(source, made)
