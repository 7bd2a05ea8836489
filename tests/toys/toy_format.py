"A format of its own: one entry of the table."

from crosscoder.basics import write_atomic
from crosscoder.model.formats import FORMATS, Format, emit, from_arrays, parse, to_safetensors

LAYOUT = {name: (f"toy.{name}", axes) for name, axes in {"encoder": "M F d", "encoder_bias": "F"}.items()}
LAYOUT |= {name: (f"toy.{name}", axes) for name, axes in {"decoder": "M d F", "decoder_bias": "d M"}.items()}


def read(tensors, settings, path):
    return from_arrays(parse(tensors, LAYOUT, path), "relu")


def write(w, folder, model):
    write_atomic(folder / "model.safetensors", to_safetensors(emit(w, LAYOUT)))


FORMATS["toy"] = Format(("toy.encoder",), (), read, write)
