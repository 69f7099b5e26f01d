"""Where a model's files are: turns what the recipe names into one folder, one file, or one snapshot of the Hub."""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core import ModelError, UnsafeError
from metier.models import demo, gguf_file

if TYPE_CHECKING:
    from metier.recipe import ModelSection

COMMIT_LETTERS = 40
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
OFFLINE_HINT = (
    "on a machine with network run `hf download {base}` and copy the cache (HF_HOME), then set HF_HUB_OFFLINE=1; "
    "or set HF_ENDPOINT to a mirror; or give model.base a local folder"
)


@dataclass(frozen=True, slots=True)
class Source:
    """What transformers must be told to read one model.

    Attributes:
        folder: Folder that holds the files.
        gguf: Header of the GGUF file, when the model is one.
        revision: Commit of a Hub model, where known.
        location: First argument of `from_pretrained`.
        options: Further arguments of `from_pretrained`.
    """

    folder: Path
    location: str
    gguf: gguf_file.Header | None = None
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_on_hub(self) -> bool:
        """Whether `location` is a Hub id."""
        return self.location != str(self.folder)


def locate(section: ModelSection) -> Source:
    """Find the files; downloads at most a Hub model's configuration, and converts the demo's model on first use.

    Raises:
        ModelError: If there is nothing there, with the nearest name that exists.
    """
    if section.base.startswith("demo:"):
        require_demo(section)
        folder = demo.folder()
        return Source(folder, str(folder))
    path = Path(section.base).expanduser()
    if path.is_dir():
        return _folder(section, path)
    if path.is_file():
        return _file(path)
    if _looks_local(section.base):
        raise _missing(section.base, path)
    return _hub(section)


def require_demo(section: ModelSection) -> None:
    """Raise ModelError unless the demo's model is what `section` names."""
    if section.base != demo.NAME:
        raise ModelError(f"there is no {section.base!r}", where="model.base", hint=f"did you mean {demo.NAME}?")


def _folder(section: ModelSection, path: Path) -> Source:
    if not (path / "config.json").is_file():
        inside = sorted(child.name for child in path.iterdir())
        hint = "name the folder that holds config.json and the weights"
        if "adapter_config.json" in inside or "adapter" in inside:
            hint = "this is an adapter; model.base is the model it was trained on"
        elif ggufs := [name for name in inside if name.endswith(".gguf")]:
            hint = f"name the file itself: model.base={path / ggufs[0]}"
        elif nested := [name for name in inside if (path / name / "config.json").is_file()]:
            hint = f"did you mean {path / nested[0]}?"
        raise ModelError("the folder has no config.json", where=str(path), hint=hint)
    return Source(path, str(path), options=_trust_folder(section, path))


def _file(path: Path) -> Source:
    if path.suffix.lower() != ".gguf":
        raise ModelError(
            "a model is a folder, a .gguf file, or a Hub id; this is another file",
            where=str(path),
            hint=f"name the folder: model.base={path.parent}",
        )
    header = gguf_file.read(path)
    return Source(path.parent, str(path.parent), gguf=header, options={"gguf_file": path.name})


def _hub(section: ModelSection) -> Source:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    base = section.base
    try:
        found = Path(hf_hub_download(base, "config.json", revision=section.revision))
    except GatedRepoError as error:
        raise _hub_error(base, "asks you to accept its terms first", "accept them there and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise _hub_error(base, "is not on the Hub, or is private", "check the spelling, or set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise _hub_error(base, f"has no revision {section.revision!r}", "leave model.revision out") from error
    except LocalEntryNotFoundError as error:
        raise _hub_error(
            base, "is not in the local cache and the Hub cannot be reached", OFFLINE_HINT.format(base=base)
        ) from error
    except EntryNotFoundError as error:
        raise _hub_error(base, "has no config.json", "name a model that transformers reads") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _hub_error(base, f"cannot be fetched ({_line(error)})", OFFLINE_HINT.format(base=base)) from error
    commit = found.parent.name if found.parent.parent.name == "snapshots" else section.revision
    return Source(found.parent, base, revision=commit, options={"revision": commit, **_trust_commit(section)})


def code_digest(folder: Path) -> str | None:
    """Hex sha256 over names and contents of every .py file below a folder; None where there is none."""
    digest, files = hashlib.sha256(), sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix())
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest() if files else None


def _trust_folder(section: ModelSection, folder: Path) -> dict[str, Any]:
    """A folder has no commits: its code is trusted as long as it is, to the byte, what the recipe names."""
    if section.trust_code is None:
        return {"trust_remote_code": False}
    digest = code_digest(folder)
    if section.trust_code != digest:
        raise UnsafeError(
            f"its Python files are not those that model.trust_code={section.trust_code} names",
            where=str(folder),
            hint=f"read them; to run them as they are now: model.trust_code={digest}"
            if digest
            else "it brings no code: leave model.trust_code out",
        )
    return {"trust_remote_code": section.trust_code == digest}


def _trust_commit(section: ModelSection) -> dict[str, Any]:
    pinned = section.trust_code is not None and len(section.trust_code) == COMMIT_LETTERS
    if section.trust_code is not None and not pinned:
        raise UnsafeError(
            "the code of a Hub model is pinned by its commit, this is the sha256 of a folder",
            where=f"model.trust_code={section.trust_code}",
            hint="give the 40 letters of the commit that you read",
        )
    return {"trust_remote_code": pinned, **({"code_revision": section.trust_code} if pinned else {})}


def _looks_local(base: str) -> bool:
    """Whether nobody would write this for a Hub id: a path, a file, or below a folder that is here."""
    is_path = base.startswith((".", "/", "~")) or "\\" in base or HUB_ID.fullmatch(base) is None
    return is_path or base.endswith(".gguf") or ("/" in base and Path(base).parent.is_dir())


def _missing(base: str, path: Path) -> ModelError:
    near = _nearest(path)
    hint = f"did you mean {near}?" if near else "check the path; a Hub id looks like owner/name"
    return ModelError("there is no such folder or file", where=f"model.base={base}", hint=hint)


def _nearest(path: Path) -> Path | None:
    """The existing neighbour whose name is most alike, one level below the deepest folder that exists."""
    parts = path.absolute().parts
    here = Path(parts[0])
    for part in parts[1:]:
        if (here / part).exists():
            here = here / part
            continue
        names = [child.name for child in here.iterdir() if child.is_dir() or child.suffix == ".gguf"]
        near = difflib.get_close_matches(part, names, 1, 0.5)
        return here / near[0] if near else None
    return None


def _hub_error(base: str, what: str, hint: str) -> ModelError:
    return ModelError(f"the model {base!r} {what}", where=f"model.base={base}", hint=hint)


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
