"""Bring the weights of the course's PyTorch network into a run folder, and back.

  python -m experiments.weights --from=context_model_31.pth --to=checkpoints/published
  python -m experiments.weights --from=checkpoints/demo --to=demo.safetensors

The network's shape is read off the tensors. The flags of the configuration, such as --schedule and
--timesteps, say on what forward process the weights were trained, and --images and --labels on what
images; without these, evaluation compares with drawn sprites and cannot look for copies.
"""

from pathlib import Path

from absl import flags

from diffusion_jax import data
from diffusion_jax.networks import torch_weights
from diffusion_jax.runs import check_new, load_model, save_model, variable_shapes
from diffusion_jax.typing import InputError, require
from experiments.flags import CONFIG, FLAGS, config, define_config, refuse_unread, run

define_config()
flags.DEFINE_string("from", None, "a .pth, .pt or .safetensors file, or a run folder")
flags.DEFINE_string("to", None, "a new run folder, or a .pth, .pt or .safetensors file")
flags.DEFINE_integer("step", None, "the checkpoint of the run folder; by default the newest")
flags.DEFINE_integer("cpu_devices", 1, "CPU cores to use as devices")
flags.mark_flags_as_required(["from", "to"])


def main() -> None:
    """Convert in the direction that --from and --to say."""
    source, target = Path(str(FLAGS["from"].value)), Path(str(FLAGS["to"].value))
    if source.suffix in torch_weights.CODECS:
        to_run(source, target)
    elif target.suffix in torch_weights.CODECS:
        if target.exists():
            raise InputError(f"to={str(target)!r} exists: name a new file")
        refuse_unread("a run that becomes a file", *CONFIG)
        variables = load_model(source, FLAGS.step).variables
        torch_weights.write_state_dict(target, torch_weights.export_state_dict(variables))
    else:
        raise InputError(
            f"from={str(source)!r}, to={str(target)!r}: "
            f"one of them must be a {', '.join(torch_weights.CODECS)} file"
        )
    print(f"written: {target}")


def to_run(source: Path, folder: Path) -> None:
    """Make a run folder of a state_dict file."""
    refuse_unread("a file that becomes a run", "step")
    check_new(folder)
    state_dict = torch_weights.read_state_dict(source)
    fields = torch_weights.infer_fields(state_dict)
    settings = config()
    if settings.data.images:
        dataset = data.load(settings.data)
        found, want = dataset.images.shape[1:], fields["image_shape"]
        require(found == want, f"images of shape {found}: the network's are {want}")
        settings = settings.fill_in(dataset)
    else:
        settings = settings.override(
            class_names=settings.data.class_names or data.default_class_names(fields["n_cfeat"]),
            fingerprint=data.UNKNOWN,
        )
    names = settings.data.class_names
    if len(names) != fields["n_cfeat"]:
        raise InputError(
            f"class_names={','.join(names)}: the network has {fields['n_cfeat']} context features"
        )
    settings = settings.override(**fields)
    template = variable_shapes(settings.network.build())
    save_model(folder, settings, torch_weights.import_state_dict(state_dict, template))


if __name__ == "__main__":
    run(main)
