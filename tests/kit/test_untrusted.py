"""Files that may hold anything: read as their own libraries would, and none of them runs."""

import base64
import bz2
import gzip
import io
import lzma
import os
import pickle
import zlib

import numpy as np
import pytest
import torch

from kit.untrusted import read_object

# {3: {"pose": float32 0 to 5 (2 3), "F": the same in columns, float64, "o": [None, "x"] of objects,
# "n": float32 3}} in a defaultdict, dumped by joblib 1.6, then compressed
JOBLIB = base64.b64decode(
    "eNqFkktP20AQgG2clAiQSMtLqFQtt/TiUw85ICUoEgcsGYkLJ2St7aVrun7IXgsigRQOgURaiQOTe39i/wHMehOaFhCjfc3uzs63"
    "MzOoTTZMoxK5HKSc00BEaVKAXA7pGSm5CKNAwAPIhl9GXETqqDbdG8IxONY1tGQtSwsKcu089Xnk20kZZ30vi4JfHHc/ukrdz3PS"
    "P8lJltEcbb/fgDJsFKUfcFLgq/XKCuRiEhJ1VzmtF4xkFJwFx7pFLc1DNJZmD9eh6OMJa85WeHvh7AeMR3dI1XIsae6B67qHjyjV"
    "4BgCfLlEOE8vvDgmGYzkZ01a+fMIj34mMU2E5/cFLcBplv7q47+iQzXo4NDFhn2A/Xd34hjTKJoHwFb079gq+8TWNDzbYLtsi20j"
    "ZPsvJPvyEpF9HbFvyrf17G8mja6e/3T03JzqxnRen+dIX3AMFcWmpjhqz4fq6r9QdSqOseYY1Cf3s1c3q4DZXpDm1I6xPCKdK7ni"
    "5TTAwhF5qevllXQ6xhB6pg/arVkBWfP5ex9qfAotV5qXQFGxJ+3n3ybwNtuHIiCcqKpjO72aShvcopOysJ8AgtAfng=="
)


class Touch:
    """Pickled, a call that makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mknod, (str(self.file),)


def npy(value: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(value, dtype=object), allow_pickle=True)
    return stream.getvalue()


WRITERS = {
    "pickle": lambda path, value: path.write_bytes(pickle.dumps(value)),
    "npy": lambda path, value: path.write_bytes(npy(value)),
    "torch": lambda path, value: torch.save(value, path),
    "joblib, compressed": lambda path, value: path.write_bytes(zlib.compress(pickle.dumps(value))),
}


@pytest.mark.parametrize("pack", [bytes, zlib.compress, gzip.compress, bz2.compress, lzma.compress])
def test_what_joblib_dumps(tmp_path, pack):
    """Catches: arrays read from the pickle's next bytes without their padding, columns taken for rows."""
    (tmp_path / "a.pkl").write_bytes(pack(zlib.decompress(JOBLIB)))
    read = read_object(tmp_path / "a.pkl", "motion")[3]
    expected = np.arange(6).reshape(2, 3)
    assert (read["pose"] == expected).all() and read["pose"].dtype == np.float32
    assert (read["F"] == expected).all() and read["o"] == [None, "x"] and read["n"] == 3


@pytest.mark.parametrize("kind", WRITERS)
def test_tensors_and_arrays_come_back(tmp_path, kind):
    """Catches: a view of a tensor read as its whole storage, half precision left as what numpy lacks, and
    AMASS's gender taken for damage."""
    whole = torch.arange(24.0).reshape(4, 6)
    value = {"view": whole[1:3, ::2], "bf16": whole[0].bfloat16(), "array": np.arange(3), "list": [1, "a"]}
    value |= {"text": np.array("neutral"), "bytes": np.array([b"male"]), "small": np.arange(3, dtype="i2")}
    WRITERS[kind](tmp_path / "file", value)
    read = read_object(tmp_path / "file", "motion")
    assert (read["view"] == [[6, 8, 10], [12, 14, 16]]).all() and (read["bf16"] == range(6)).all()
    assert (read["array"] == range(3)).all() and read["list"] == [1, "a"]
    assert read["text"] == "neutral" and read["bytes"] == [b"male"] and (read["small"] == range(3)).all()


@pytest.mark.parametrize("kind", WRITERS)
def test_no_file_runs_anything(tmp_path, kind):
    """Catches: any way to pickle.load or torch.load without the allow-list."""
    bait = tmp_path / "bait"
    WRITERS[kind](tmp_path / "file", {"a": Touch(bait)})
    named = r"file cannot be read: it names posix\.mknod, which no motion needs"
    with pytest.raises(ValueError, match=named) as error:
        read_object(tmp_path / "file", "motion")
    assert not bait.exists() and "\n" not in str(error.value)
    pickle.loads(pickle.dumps(Touch(bait)))
    assert bait.exists()  # it was armed


def test_a_storage_in_a_pickle_runs_nothing_either(tmp_path):
    """A tensor's bytes are a torch file within the pickle. Catches: those bytes read without the list."""
    torch.save(Touch(tmp_path / "bait"), tmp_path / "inner", _use_new_zipfile_serialization=False)
    inner = (tmp_path / "inner").read_bytes()

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner,)

    WRITERS["pickle"](tmp_path / "file", Storage())
    with pytest.raises(ValueError, match=r"posix\.mknod"):
        read_object(tmp_path / "file", "motion")
    assert not (tmp_path / "bait").exists()


@pytest.mark.parametrize("share", [0, 0.02, 0.95])
@pytest.mark.parametrize("kind", [*WRITERS, "joblib"])
def test_what_is_cut_short_is_told_in_one_line(tmp_path, kind, share):
    """Catches: errors of zip, zlib, torch and pickle that go up as they are, or over many lines."""
    file = tmp_path / "file"
    if kind == "joblib":
        file.write_bytes(zlib.decompress(JOBLIB))
    else:
        WRITERS[kind](file, {"a": torch.arange(100.0), "b": np.arange(100)})
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"file cannot be read: it is (empty|damaged or cut short)") as error:
        read_object(file, "motion")
    assert "\n" not in str(error.value)


def test_a_file_that_names_itself_ends(tmp_path):
    """Catches: a list in itself, or lists of lists that grow without end, followed for ever."""
    loop, wide = [], []
    loop.append(loop)
    for _ in range(100):
        wide = [wide, wide]
    WRITERS["pickle"](tmp_path / "loop", loop)
    with pytest.raises(ValueError, match="damaged"):
        read_object(tmp_path / "loop", "motion")
    WRITERS["pickle"](tmp_path / "wide", wide)
    read_object(tmp_path / "wide", "motion")
