"""No code from data: what the sources may not call, read from their syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import delo_llava

ROOT = Path(delo_llava.__file__).parents[1]
PARTS = ("delo_llava", "eval", "launch", "benchmarks", "data_recipes", "ds_configs")

#: Modules that execute what they read, or unpack archives, whose names can lead anywhere.
MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "zipfile",
    "tarfile", "bz2", "lzma", "gzip", "code", "codeop", "runpy", "telnetlib", "xmlrpc",
}  # fmt: skip

#: Calls by their last name; for those with a dot, by the whole of it.
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execl", "os.execv", "os.spawnl",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.Loader", "yaml.UnsafeLoader",
    "yaml.FullLoader", "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "extractall",
    "unpack_archive", "shutil.unpack_archive", "literal_eval", "subprocess.getoutput",
    "subprocess.getstatusoutput", "sys.set_int_max_str_digits",
}  # fmt: skip

#: Keywords that may only have this value, wherever they stand.
KEYWORDS = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "weights_only": True}


def sources() -> list[Path]:
    return sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))


def faults(tree: ast.AST) -> Iterator[str]:
    """What a syntax tree has that it should not."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            given = [alias.name for alias in node.names]
            named = given if isinstance(node, ast.Import) else [node.module or "", *given]
            yield from (f"{line}: import of {name}" for name in named if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # A module's own `eval()`, such as torch's, has no arguments.
            plain = isinstance(node.func, ast.Name) or called.rpartition(".")[2] in ("extractall",)
            if called in CALLS or (plain and called.rpartition(".")[2] in CALLS):
                yield f"{line}: call of {called}"
        if isinstance(node, ast.keyword) and node.arg in KEYWORDS and not _is(node.value, KEYWORDS[node.arg]):
            yield f"{node.value.lineno}: {node.arg}={ast.unparse(node.value)}"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                if name in KEYWORDS and not _is(value, KEYWORDS[name]):
                    yield f"{line}: {name}: {ast.unparse(value)}"


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_there_are_sources_to_look_at() -> None:
    assert len(sources()) > 100


def test_nothing_executes_what_it_reads() -> None:
    found = [f"{path}:{fault}" for path in sources() for fault in faults(ast.parse(path.read_text("utf-8")))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from zipfile import ZipFile", "eval(answer)", "exec(text)", "os.system(name)",
        "torch.load(path)", "yaml.load(text)", "archive.extractall(folder)", "import tarfile as t",
        "subprocess.run(command, shell=True)", "np.load(path, allow_pickle=True)",
        "Model.from_pretrained(path, trust_remote_code=flag)", "options = {'trust_remote_code': True}",
        "load(path, weights_only=False)", "def f():\n    from pickle import loads",
    ],
)  # fmt: skip
def test_the_look_finds_what_it_looks_for(text: str) -> None:
    assert list(faults(ast.parse(text)))


@pytest.mark.parametrize("text", ["model.eval()", "re.compile(pattern)", "torch.compile(m)", "np.load(p)"])
def test_the_look_passes_what_is_harmless(text: str) -> None:
    assert not list(faults(ast.parse(text)))


def test_every_model_and_processor_is_loaded_without_its_code() -> None:
    """Left out, the answer would be asked for on the terminal; adapters are opened by folder and not here."""
    missing = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr == "from_pretrained" and owner.startswith("Auto"):
                spread = {ast.unparse(word.value) for word in node.keywords if word.arg is None}
                named = {word.arg for word in node.keywords}
                if "trust_remote_code" not in named and not spread & {"OWN_CODE", "options"}:
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {owner}.from_pretrained")
    assert missing == []
