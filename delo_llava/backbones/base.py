"""A model family as the rest of the project sees it: how it loads, what is adapted, how a prompt reads."""

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from delo_llava.backbones import _quant
from delo_llava.backbones._checkpoint import (
    read_config,
    refuse_pointers,
    require_tower,
    require_whole,
    require_words,
    told_if_absent,
)
from delo_llava.backbones._planned import PlannedImage, tile_patches, tower_floats
from delo_llava.backbones._template import from_template, require_end_token
from delo_llava.data.dialogue import Dialogue
from delo_llava.data.images import EncodedImage, ImageLimits
from delo_llava.errors import DeloError
from delo_llava.registry import load_plugin, plugin_names

#: Models shipped inside the package, by name -> folder relative to the package.
SHIPPED = {"mini-llava": "mini/assets/mini_llava", "mini-qwen": "mini/assets/mini_qwen"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: For every `from_pretrained`: code that a checkpoint brings is never run, and no one is asked about it.
OWN_CODE: dict[str, Any] = {"trust_remote_code": False}
Quant = Literal["nf4", "none"]
OWN_LIMITS = ImageLimits()  # pictures as large as the checkpoint says
ATTENTION = ("flash_attention_2", "sdpa", "eager")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Parts:
    """What makes model inputs of a checkpoint's records: its own parts, without its processor class.

    Attributes:
        tokenizer: fast; image_processor: for PIL pictures; config: the model's.
        dialogue: how the checkpoint writes a turn.
    """

    tokenizer: Any
    image_processor: Any
    config: Any
    dialogue: Dialogue


class Backbone(ABC):
    """Knowledge of one family; stateless: one instance (`BACKBONE` of its module) serves all its models.

    Attributes:
        model_types: values of `model_type` in config.json that this class handles.
        language_pattern: full-match regex of the names of the language layers' attention and MLP linears.
        projector_pattern: full-match regex of the names of the projector's linears; empty: it has none.
        projector_name: module whose output are the image tokens that the language model reads.
        unquantised: what stays in full precision under NF4. A skip module is matched from the start of a name
            or as a suffix, so the paths are whole: with a bare "vision_tower" the tower would be quantised
            silently.
        image_token: what one image token is in a prompt, and the placeholder of a whole picture.
        placeholders: what chat templates write for a picture; empty: the image token.
        attention: implementations that can run, in the order in which `auto` tries them.
        limits: those of `ImageLimits` that can be set -> the image processor's option.
        default_dialogue: where a checkpoint brings no chat template.
    """

    model_types: ClassVar[tuple[str, ...]]
    language_pattern: ClassVar[str] = (
        r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    )
    projector_pattern: ClassVar[str]
    projector_name: ClassVar[str] = "model.multi_modal_projector"
    unquantised: ClassVar[tuple[str, ...]] = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    image_token: ClassVar[str]
    placeholders: ClassVar[tuple[str, ...]] = ()
    attention: ClassVar[tuple[str, ...]] = ATTENTION
    limits: ClassVar[Mapping[str, str]] = {}
    default_dialogue: ClassVar[Dialogue]

    def load(
        self,
        path: str,
        *,
        quant: Quant = "nf4",
        dtype: str | torch.dtype = "auto",
        attn: str = "auto",
        device: str = "auto",
    ) -> Any:
        """The frozen pretrained model in evaluation mode.

        Args:
            path: folder or hub id, as returned by `find_backbone`.
            quant: `nf4` quantises the language layers' linears (double quantisation), and nothing else.
            dtype: of what is not quantised and of 4-bit arithmetic; `auto` is fp32 on the CPU, bf16 on CUDA.
            attn: attention implementation; `auto` is the first of `attention` that can run.
            device: `auto`, `cpu`, `cuda` or `cuda:1`.

        Raises:
            DeloError: an unknown choice, or a checkpoint whose linears are not where this family has them.
        """
        from transformers import AutoModelForImageTextToText

        place = resolve_device(device)
        number = resolve_dtype(dtype, place)
        options: dict[str, Any] = {"use_safetensors": True, "dtype": number, "device_map": {"": str(place)}}
        options |= OWN_CODE
        if quant == "nf4":
            options["quantization_config"] = _quant.nf4_config(number, self.unquantised)
        elif quant != "none":
            raise DeloError("Unknown quantisation.", given=quant, allowed=("nf4", "none"))
        choices = attention_choices(attn, place, number, self.attention)
        build = AutoModelForImageTextToText.from_pretrained
        require_whole(path)
        with told_if_absent(path, "weights"):
            model = first_that_builds(choices, lambda a: build(path, attn_implementation=a, **options))
        self.prepare(model)
        adapted_linears(model, self)
        if quant == "nf4":
            _quant.check_quantised(model, self.language_pattern)
            _quant.keep_exact_on_cpu(model)
        decode_plainly(model)
        return model.requires_grad_(False).eval()

    def load_processor(self, path: str, limits: ImageLimits = OWN_LIMITS) -> Parts:
        """The checkpoint's tokenizer, image processor, configuration and dialogue.

        Raises:
            DeloError: tokenizer and configuration disagree on the image token, no single token ends answers,
                or the family knows no such limit.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ProcessorMixin

        refuse_pointers(path)
        with told_if_absent(path, "configuration", ValueError):
            config = AutoConfig.from_pretrained(path, **OWN_CODE)
        with told_if_absent(path, "tokenizer", ValueError):
            tokenizer = AutoTokenizer.from_pretrained(path, **OWN_CODE)
        require_words(path)
        known = tokenizer.convert_tokens_to_ids(self.image_token)
        if known != config.image_token_id:
            raise DeloError(
                "Tokenizer and configuration disagree on the image token.",
                given=f"{self.image_token} is {known}, config.json says {config.image_token_id}",
                fix="take both from one checkpoint",
            )
        template = ProcessorMixin.get_processor_dict(path)[0].get("chat_template") or tokenizer.chat_template
        dialogue = self.dialogue(tokenizer, template)
        require_end_token(dialogue, tokenizer)
        options = OWN_CODE | self.limit_options(limits)
        with told_if_absent(path, "image processor", ValueError):
            images = AutoImageProcessor.from_pretrained(path, **options)
        return Parts(tokenizer, images, config, dialogue)

    def limit_options(self, limits: ImageLimits) -> dict[str, int]:
        """Options of the image processor that set limits.

        Raises:
            DeloError: the family has no such limit.
        """
        given = limits.given()
        for name in given:
            if name not in self.limits:
                raise DeloError(
                    f"This family's pictures have no such limit: {type(self).__name__}",
                    given=f"--data.{name}={given[name]}",
                    allowed=[f"--data.{known}" for known in self.limits],
                    fix="leave it out; docs/backbones.md says how large pictures are",
                )
        return {self.limits[name]: value for name, value in given.items()}

    def dialogue(self, tokenizer: Any, template: str | None) -> Dialogue:
        """How a turn is written: as the checkpoint's chat template does, else `default_dialogue`."""
        if template is None:
            return self.default_dialogue
        return from_template(tokenizer, template, self.placeholders or (self.image_token,))

    def prepare(self, model: nn.Module) -> None:
        """Change a model just loaded, or on the meta device, so that it can be adapted; most need nothing."""
        return None

    def projector(self, model: nn.Module) -> nn.Module:
        """The projector of a loaded model, bare or wrapped by PEFT."""
        return unwrapped(model).get_submodule(self.projector_name)

    def image_token_id(self, model: nn.Module) -> int:
        """Token id that the model replaces by projector output."""
        return int(config_of(model).image_token_id)

    def hidden_size(self, model: nn.Module) -> int:
        """Width of the language model: of word embeddings and of the projector's output."""
        return int(config_of(model).get_text_config().hidden_size)

    @abstractmethod
    def encode_image(self, parts: Parts, image: Image.Image) -> EncodedImage:
        """One RGB picture as the model takes it.

        Raises:
            ValueError: the model takes no picture of this form.
        """

    def tiny_image(self, parts: Parts) -> dict[str, Tensor]:
        """Model inputs of a picture of no meaning that costs little."""
        return self.encode_image(parts, Image.new("RGB", (32, 32))).inputs

    def planned_image(self, config: Any) -> PlannedImage:
        """What a picture of 1024×768 costs; by default one tile, every patch a token."""
        patches = tile_patches(config.vision_config)
        return PlannedImage(patches, patches, tower_floats(config.vision_config))

    def sequence_inputs(self, segments: Tensor, answers: Tensor) -> dict[str, Tensor]:
        """Further model inputs that follow from the token kinds `segments` (uint8 B×S) and from which tokens
        are the answer's (bool B×S).
        """
        return {}


def find_backbone(path_or_name: str | Path) -> tuple[Backbone, str]:
    """The family of a model and the path to load it from, by its config's `model_type`, never by its name.

    Args:
        path_or_name: name of a shipped model, folder, or hub id (`org/name`; only this may use the network).

    Raises:
        DeloError: no such model, a config without model_type, or a family without a backbone.
    """
    path = _resolve(str(path_or_name))
    config = read_config(path)
    kind = str(config["model_type"])
    names = plugin_names("backbone")
    for name in sorted(names, key=lambda n: n != kind):
        backbone = load_plugin("backbone", name)
        if isinstance(backbone, Backbone) and kind in backbone.model_types:
            require_tower(config, path)
            return backbone, path
    raise DeloError(
        f"No backbone knows the model type of {path_or_name}.",
        given=kind,
        allowed=names,
        fix="add delo_llava/backbones/<model_type>.py with a BACKBONE",
    )


def adapted_linears(model: nn.Module, backbone: Backbone) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of every linear that experts adapt: language layers, then projector, in model order.

    Raises:
        DeloError: language layers or projector have none: the checkpoint is not laid out as expected.
            (An empty `projector_pattern` asks for none.)
    """
    model = unwrapped(model)
    linears = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found: dict[str, tuple[int, int]] = {}
    for part, pattern in (("language", backbone.language_pattern), ("projector", backbone.projector_pattern)):
        if not pattern:
            continue
        matched = {n: (m.in_features, m.out_features) for n, m in linears.items() if re.fullmatch(pattern, n)}
        if not matched:
            raise DeloError(
                f"This model has no {part} linear named as its family has them.",
                given=type(model).__name__,
                allowed=[pattern],
            )
        found |= matched
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model (or the model itself)."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def quiet_loading() -> None:
    """Let transformers draw no bar for each load of weights in this process."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def resolve_device(device: str) -> torch.device:
    """`auto` -> CUDA when there is one; a CUDA device that is not there is an error."""
    if device == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise DeloError("Unknown device.", given=device, allowed=("auto", "cpu", "cuda")) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DeloError(
            "CUDA was asked for, but torch sees no GPU.",
            given=device,
            fix="use --device=cpu or install a CUDA build of torch",
        )
    return place


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` -> fp32 on the CPU (bf16 is 14-27 times slower there), bf16 on CUDA."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise DeloError("Unknown number format.", given=dtype, allowed=("auto", *DTYPES))
    return DTYPES[dtype]


def attention_choices(
    attn: str, device: torch.device, dtype: torch.dtype, allowed: Sequence[str] = ATTENTION
) -> tuple[str, ...]:
    """What to try, in order: `attn` itself, or for `auto` all of `allowed` that can run here. flash-attn must
    be importable, on CUDA, and in half precision (it knows no fp32).

    Raises:
        DeloError: an unknown implementation, one that the family cannot use, or one that cannot run here.
    """
    if attn not in ("auto", *ATTENTION):
        raise DeloError("Unknown attention.", given=attn, allowed=("auto", *ATTENTION))
    if attn not in ("auto", *allowed):
        raise DeloError(
            "This family's masks do not work with this attention.", given=attn, allowed=("auto", *allowed),
            fix=f"use --attn={allowed[0]}",
        )  # fmt: skip
    can_flash = (
        device.type == "cuda"
        and dtype != torch.float32
        and importlib.util.find_spec("flash_attn") is not None
    )
    if attn == "flash_attention_2" and not can_flash:
        raise DeloError(
            "flash_attention_2 needs the flash-attn package, CUDA, and bf16 or fp16.",
            given=f"{device}, {dtype}",
            fix="use --attn=sdpa",
        )
    if attn != "auto":
        return (attn,)
    return tuple(choice for choice in allowed if can_flash or choice != "flash_attention_2")


def first_that_builds(choices: Sequence[str], build: Callable[[str], Any]) -> Any:
    """A model with the first attention that it has: `build` raises ValueError for one that it has not."""
    for choice in choices[:-1]:
        try:
            return build(choice)
        except ValueError:
            continue
    return build(choices[-1])


def decode_plainly(model: Any) -> None:
    """Drop the sampling and repetition settings that a checkpoint brings: evaluations set their own."""
    settings = model.generation_config
    settings.do_sample, settings.num_beams = False, 1
    settings.temperature = settings.top_p = settings.top_k = settings.repetition_penalty = None
    if settings.pad_token_id is None:
        settings.pad_token_id = config_of(model).get_text_config().pad_token_id


def config_of(model: nn.Module) -> Any:
    """The configuration of a model, bare or wrapped by PEFT."""
    return unwrapped(model).config


def _resolve(name: str) -> str:
    """A folder with config.json, or a hub id, for what the user wrote."""
    folder = (
        Path(str(files("delo_llava").joinpath(SHIPPED[name]))) if name in SHIPPED else Path(name).expanduser()
    )
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DeloError("This folder holds no model: config.json is missing.", given=folder)
        if (folder / "adapter_config.json").exists():
            raise DeloError(
                "This folder holds an adapter too, upon which another base would be loaded in its place.",
                given=folder / "adapter_config.json",
                fix="move the adapter's files into a folder of their own",
            )
        return str(folder)
    if name not in SHIPPED and _HUB_ID.fullmatch(name) and not folder.parent.is_dir():
        return name
    raise DeloError(
        "There is no such model.",
        given=name,
        allowed=SHIPPED,
        fix="give a folder, a hub id (org/name) or a shipped model",
    )
