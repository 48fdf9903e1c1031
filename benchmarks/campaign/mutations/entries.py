"""What stands in place of a file, and what stands around it: pipes, devices, links, names, permission bits."""

import os
import shutil
import socket
from pathlib import Path
from random import Random

from ..place import Place
from . import NotApplicable, mutation


@mutation("entry")
def missing(path: Path, random: Random, place: Place) -> str:
    path.unlink()
    return "removed"


@mutation("entry")
def folder(path: Path, random: Random, place: Place) -> str:
    path.unlink()
    path.mkdir()
    if random.random() < 0.5:
        (path / "inside.txt").write_text("mine\n")
    return "replaced by a folder"


@mutation("entry")
def pipe(path: Path, random: Random, place: Place) -> str:
    path.unlink()
    os.mkfifo(path)
    return "replaced by a FIFO"


@mutation("entry")
def unix_socket(path: Path, random: Random, place: Place) -> str:
    path.unlink()
    here = os.open(path.parent, os.O_RDONLY)
    try:  # paths of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")
    except OSError as error:
        path.touch()
        raise NotApplicable from error
    finally:
        os.close(here)
    return "replaced by a socket"


@mutation("entry")
def device(path: Path, random: Random, place: Place) -> str:
    path.unlink()
    name = random.choice(["zero", "full", "random", "null", "tty", "stdin"])
    path.symlink_to(f"/dev/{name}")
    return f"replaced by a link to /dev/{name}"


@mutation("entry")
def dangling_link(path: Path, random: Random, place: Place) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "replaced by a dangling link"


@mutation("entry")
def link_to_itself(path: Path, random: Random, place: Place) -> str:
    path.unlink()
    path.symlink_to(path.name)
    return "replaced by a link to itself"


@mutation("entry")
def link_to_a_victim(path: Path, random: Random, place: Place) -> str:
    """A link to somebody else's file: whoever writes or removes must not follow it."""
    victim = random.choice(place.victims)
    path.unlink()
    path.symlink_to(victim if random.random() < 0.5 else os.path.relpath(victim, path.parent))
    return f"replaced by a link to {victim.relative_to(place.root)}"


@mutation("entry")
def linked_file(path: Path, random: Random, place: Place) -> str:
    """The same content through a link."""
    kept = place.elsewhere / f"kept-{path.name}"
    shutil.move(path, kept)
    path.symlink_to(kept)
    return "moved elsewhere, with a link in its place"


@mutation("entry")
def linked_folder(path: Path, random: Random, place: Place) -> str:
    """The folder that holds the file is a link to where somebody else keeps the same and more."""
    # Not the first level: an output that is itself a link is written to.
    folders = [folder for folder in path.parents if place.work in folder.parents and folder.parent != place.work]
    if not folders:
        raise NotApplicable
    folder = random.choice(folders)
    kept = place.elsewhere / folder.name
    if kept.exists():
        raise NotApplicable
    shutil.move(folder, kept)
    (kept / "step-00000001").mkdir()
    (kept / "step-00000001" / "thesis.txt").write_text("not yours\n")
    folder.symlink_to(kept)
    return f"{folder.relative_to(place.work)} is a link elsewhere"


@mutation("entry")
def no_permission(path: Path, random: Random, place: Place) -> str:
    target = random.choice([path, path, path.parent])
    mode = random.choice([0o000, 0o200, 0o444, 0o555] if target == path else [0o000, 0o444, 0o555])
    if target == place.work:
        raise NotApplicable
    target.chmod(mode)
    return f"{target.relative_to(place.work)} has mode {mode:03o}"


@mutation("entry")
def huge_sparse_file(path: Path, random: Random, place: Place) -> str:
    size = random.choice([1 << 31, 3 << 30, 1 << 40])
    os.truncate(path, size)
    return f"extended to {size} bytes of zeros"


@mutation("entry")
def hostile_name(path: Path, random: Random, place: Place) -> str:
    """A copy of the file under a name that is hard to print or to write."""
    names = [
        b"\xff\xfe" + os.fsencode(path.suffix),
        b"a" * (255 - len(path.suffix)) + os.fsencode(path.suffix),
        "é".encode() * ((255 - len(path.suffix)) // 2) + os.fsencode(path.suffix),
        b"two\nlines" + os.fsencode(path.suffix),
        b"\x1b[31mred" + os.fsencode(path.suffix),
        b"--overwrite" + os.fsencode(path.suffix),
        b" " + os.fsencode(path.suffix),
        b"a:b|c*d?" + os.fsencode(path.suffix),
        "‮gnp.exe".encode() + os.fsencode(path.suffix),
    ]
    name = random.choice(names)
    here = os.path.join(os.fsencode(path.parent), name)
    if random.random() < 0.3 and path.parent != place.work:  # the folder, e.g. a class
        here = os.path.join(os.fsencode(path.parent.parent), name)
        shutil.copytree(path.parent, os.fsdecode(here), symlinks=True)
        return f"its folder is also there as {name!r}"
    shutil.copyfile(os.fsencode(path), here)
    return f"also there as {name!r}"


@mutation("entry")
def swapped(path: Path, random: Random, place: Place) -> str:
    others = [p for p in sorted(place.work.rglob("*")) if p.is_file() and p != path and p.suffix == path.suffix]
    if not others:
        raise NotApplicable
    other = random.choice(others)
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
    return f"swapped with {other.relative_to(place.work)}"
