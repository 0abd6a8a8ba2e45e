"""Convert a run to a sampler file, to or from PyTorch weights, or to a different average.

  python -m experiments.convert --from=checkpoints/demo --to=demo.sampler --sampler=ddim:25
  python -m experiments.convert --from=checkpoints/demo --to=mine.json --sampler=unipc:10
  python -m experiments.convert --from=checkpoints/demo --to=demo.safetensors
  python -m experiments.convert --from=context_model_31.pth --to=checkpoints/published
  python -m experiments.convert --from=checkpoints/demo --to=checkpoints/wider --sigma_rel=0.15

The names decide the direction. A .pth, .pt or .safetensors file holds the weights of the course's
network. A .sampler file holds a model and a sampler, and samples without this library. A .json file
holds the numbers of a sampler for the run's schedule. All other names are run folders. Weights
become a run with the forward process that --schedule and --prediction describe. --sigma_rel needs a
run that was trained with snapshots, such as --ema=power:snapshots=16 (Karras et al. 2023,
arXiv:2312.02696).
"""

from pathlib import Path

from absl import flags

from diffusion_jax import data, samplers
from diffusion_jax.data import default_class_names
from diffusion_jax.networks import torch_weights, variable_shapes
from diffusion_jax.networks.precisions import PRECISIONS
from diffusion_jax.runs import check_new, load_config, load_model, reconstruct, save_model
from diffusion_jax.sampling import exporting
from diffusion_jax.tableau import interchange
from diffusion_jax.typing import require
from experiments import app
from experiments.app import Args

SUFFIX = ".sampler"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

app.define("preset", sampler="ddim:25")
flags.DEFINE_string("from", None, "a run folder, or a .pth, .pt or .safetensors file")
flags.DEFINE_string(
    "to", None, "the new run folder, or .pth, .pt, .safetensors, .sampler or .json file"
)
flags.DEFINE_integer("step", None, "the training step of the checkpoint; by default the newest")
flags.DEFINE_float("sigma_rel", None, "the width of the average relative to the run, up to 0.28")
flags.DEFINE_boolean("scale", False, "of a .sampler: take the scale of guidance as an argument")
flags.DEFINE_enum("compute", "float32", list(PRECISIONS), "of a .sampler: the network's precision")
flags.DEFINE_list("platforms", list(exporting.PLATFORMS), f"of a .sampler: {', '.join(PLATFORMS)}")
flags.DEFINE_integer("cpu_devices", 1, "how many CPU cores to use as devices")
flags.mark_flags_as_required(["from", "to"])


def main(args: Args) -> None:
    """Convert in the direction that the names give."""
    source, target = Path(getattr(args, "from")), Path(args.to)
    if source.suffix in torch_weights.CODECS:
        convert = from_torch
    elif target.suffix in torch_weights.CODECS:
        convert = to_torch
    elif target.suffix == SUFFIX:
        convert = to_sampler
    elif target.suffix == ".json":
        convert = to_table
    else:
        convert = to_average
    convert(args, source, target)
    print(f"written: {target}")


def from_torch(args: Args, source: Path, target: Path) -> None:
    """Make a run folder from a state_dict file."""
    config = app.config(args)
    require(not args.flag("network").present, "network: the weights decide it: leave it out")
    args.refuse_unread("a conversion from PyTorch")
    check_new(target)
    state_dict = torch_weights.read_state_dict(source)
    fields = torch_weights.infer_fields(state_dict)
    shape, n_cfeat = fields.pop("image_shape"), fields.pop("n_cfeat")
    network = ":".join(["context_unet", *(f"{name}={value}" for name, value in fields.items())])
    if args.data is None:
        config = config.override(data="unknown", class_names=default_class_names(n_cfeat))
    else:
        config = config.fill_in(data.load(config.data))
        found = config.image_shape, config.n_cfeat
        require(
            found == (shape, n_cfeat),
            f"images, features {found}: not the network's {(shape, n_cfeat)}",
        )
    config = config.override(network=network, image_shape=shape)
    template = variable_shapes(config.build_network())
    save_model(target, config, torch_weights.import_state_dict(state_dict, template))


def to_torch(args: Args, source: Path, target: Path) -> None:
    """Write a run's weights as a state_dict file."""
    step = args.step
    args.refuse_unread("a conversion to PyTorch")
    require(not target.exists(), f"to={str(target)!r} exists: name a new file")
    variables = load_model(source, step).variables
    torch_weights.write_state_dict(target, torch_weights.export_state_dict(variables))


def to_sampler(args: Args, source: Path, target: Path) -> None:
    """Write a run's model and a sampler as one file."""
    step, text, names = args.step, args.sampler, args.platforms
    known = names and {*names} <= {*PLATFORMS}
    require(known, f"platforms={','.join(names)}: choose from {', '.join(PLATFORMS)}")
    options = {"guidance": args.scale, "dtype": args.compute, "platforms": names}
    args.refuse_unread("the conversion to a .sampler file")
    exporting.check_new(target)
    tableau = samplers.build(text, load_config(source).build_schedule())
    sampler = exporting.export_sampler(load_model(source, step), tableau, **options)
    exporting.write_sampler(target, sampler)
    arguments = "seed, context, scale" if args.scale else "seed, context"
    print(f"a function of ({arguments}) on {', '.join(names)}")


def to_table(args: Args, source: Path, target: Path) -> None:
    """Write a sampler for a run's schedule as a JSON file."""
    text = args.sampler
    args.refuse_unread("the conversion to a .json file")
    require(not target.exists(), f"to={str(target)!r} exists: name a new file")
    config = load_config(source)
    schedule = config.build_schedule()
    tableau = samplers.build(text, schedule)
    interchange.write(target, tableau, str(samplers.parse(text, schedule)), config.schedule)


def to_average(args: Args, source: Path, target: Path) -> None:
    """Make an average that a run did not keep from the snapshots of those that it kept."""
    sigma_rel, step = args.sigma_rel, args.step
    args.refuse_unread("the conversion of a run to a run")
    require(sigma_rel is not None, f"to={target}: a new run takes --sigma_rel, or name a file")
    check_new(target)
    found = reconstruct(source, sigma_rel, step)
    config = load_config(source).override(ema=f"power:{sigma_rel}")
    save_model(target, config, found.variables)
    print(
        f"the average of sigma_rel {sigma_rel} at step {found.step}; "
        f"its weights over the steps are met to {found.error:.2%}"
    )


if __name__ == "__main__":
    app.run(main)
