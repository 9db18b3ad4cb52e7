"""The torch artefact: `model.safetensors` with packed weights, and `sparsify.json` that says how to rebuild the module.

Only data is written and read: no pickle. A module whose class cannot be found again from its description is rebuilt
into one the user gives.
"""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsify_compiler.checkpoint import durable_write
from sparsify_compiler.errors import ExportError, ModelError
from sparsify_compiler.frontends.layout import from_problem, to_problem
from sparsify_compiler.graph import ConvLayout, Layout, MatmulLayout, Site
from sparsify_compiler.kernel import Packed
from sparsify_compiler.pattern import parse_pattern
from sparsify_compiler.runtime.formats import format_for, kept_entries, unpack

WEIGHTS = "model.safetensors"
DESCRIPTION = "sparsify.json"
VERSION = 2
"""2 added the kernels' variants; files of 1 are read without."""

_TABLE = {"model": dict, "device": str, "tokens": [int], "aliases": {"": str}, "sites": {"": dict}}
_SITE = {"kind": str, "parameters": [str], "shape": [int], "pattern": str, "packed": str, "tensors": [str]}
_SITE |= {"run": int, "groups": int, "kernel": str, "variants": str, "calls": int}
_MATMUL = {"transposed": bool, "input_axis": int}
_CONV = {"kernel_size": [int], "stride": [int], "padding": [[int]], "dilation": [int]}


@dataclass(frozen=True)
class PrunedSite:
    """A pruned site as the artefact keeps it. `keep` is (groups, out, in) bool; `kernel`, `variants` what runs it."""

    site: Site
    pattern: str
    keep: Tensor
    parameters: tuple[str, ...]
    kernel: str = "dense"
    variants: str = ""


@dataclass(frozen=True)
class Artefact:
    """What `read_artefact` found: the state dict with dense weights, the masks, and how to rebuild the module."""

    model: Mapping[str, Any]
    state: dict[str, Tensor]
    sites: tuple[PrunedSite, ...]
    packed: Mapping[str, Packed]
    device: str
    tokens: tuple[int, ...]


def write_artefact(
    folder: Path,
    state: Mapping[str, Tensor],
    sites: tuple[PrunedSite, ...],
    model: Mapping[str, Any],
    device: str,
    tokens: tuple[int, ...],
) -> dict[str, Packed]:
    """Write the artefact into `folder` and return every site's packed weight by site name.

    `state` is the dense module's state dict, zeros in place; `model` is its description (`export.describe`);
    `device` names where the kernels were measured.

    Raises:
        ExportError: the disk is full or the folder cannot be written.
    """
    packed = {site.site.name: pack_site(state, site) for site in sites}
    pruned = {name: site.site.name for site in sites for name in site.parameters}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        if name in pruned:
            continue
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in places:
            aliases[name] = places[place]
            continue
        places[place] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    for site in sites:
        for key, tensor in packed[site.site.name].tensors.items():
            tensors[f"{site.parameters[0]}::{key}"] = tensor.cpu().contiguous()
    description = {
        "format": "sparsify-compiler",
        "version": VERSION,
        "model": dict(model),
        "device": device,
        "tokens": list(tokens),
        "aliases": aliases,
        "sites": {site.site.name: _describe_site(site, packed[site.site.name]) for site in sites},
    }
    try:
        save_file(tensors, folder / WEIGHTS, {"format": "sparsify-compiler"})
    except (SafetensorError, OSError) as error:
        raise ExportError(f"cannot write {folder / WEIGHTS}: {error}; free some space or choose another disk") from None
    durable_write(folder / DESCRIPTION, json.dumps(description, indent=1).encode())
    # safetensors writes for the owner alone; the weights are as readable as the rest of the folder
    (folder / WEIGHTS).chmod(stat.S_IMODE((folder / DESCRIPTION).stat().st_mode))
    return packed


def read_description(folder: Path) -> dict[str, Any]:
    """Read what an artefact says of itself, without its weights.

    Raises:
        ModelError: not an artefact, a newer version, or damaged.
    """
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name}; give a folder that compile wrote")
    try:
        table = json.loads((folder / DESCRIPTION).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder}: the artefact is damaged ({error}); compile it again") from None
    if (
        not isinstance(table, dict)
        or table.get("format") != "sparsify-compiler"
        or not _fits(table.get("version"), int)
    ):
        raise ModelError(f"{folder / DESCRIPTION}: not a description that compile wrote")
    if table["version"] > VERSION:
        raise ModelError(f"{folder}: written as version {table['version']}; this release reads up to {VERSION}")
    _check(table, _TABLE, str(folder / DESCRIPTION))
    found: dict[str, Any] = table
    return found


def read_artefact(folder: Path) -> Artefact:
    """Read an artefact of this version or an older one.

    Raises:
        ModelError: not an artefact, a newer version, truncated, or weights and description that do not agree.
    """
    table = read_description(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"{folder}: the artefact is damaged ({error}); compile it again") from None
    sites, packed = [], {}
    for name, entry in table["sites"].items():
        if table["version"] < 2:
            entry["variants"] = ""
        site, weight, native = _read_site(f"{folder / DESCRIPTION}, site {name!r}", name, entry, tensors)
        sites.append(site)
        packed[name] = weight
        for parameter in site.parameters:
            tensors[parameter] = native
    for alias, name in table["aliases"].items():
        if name not in tensors:
            raise ModelError(f"{folder}: {alias!r} shares the tensor {name!r}, which is missing; compile it again")
        tensors[alias] = tensors[name]
    state = {name: tensor for name, tensor in tensors.items() if "::" not in name}
    return Artefact(table["model"], state, tuple(sites), packed, table["device"], tuple(table["tokens"]))


def load_state(module: nn.Module, artefact: Artefact, where: str) -> None:
    """Put the artefact's dense state into `module`, in place, in the artefact's dtypes. Raises ModelError."""
    own = module.state_dict()
    missing, unknown = sorted(set(own) - set(artefact.state)), sorted(set(artefact.state) - set(own))
    wrong = [n for n, t in own.items() if n in artefact.state and t.shape != artefact.state[n].shape]
    if missing or unknown or wrong:
        problem = f"missing {missing[0]!r}" if missing else f"unknown {unknown[0]!r}" if unknown else f"{wrong[0]!r}"
        raise ModelError(f"{where}: the weights do not fit {type(module).__name__} ({problem}); give the same class")
    tied: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    module.load_state_dict(artefact.state, assign=True)
    for first, *others in tied.values():  # assigning gave every name a Parameter of its own
        for name in others:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, module.get_parameter(first))


def pack_site(state: Mapping[str, Tensor], site: PrunedSite) -> Packed:
    """Pack one pruned site's weight from the module's state dict."""
    weight = to_problem(state[site.parameters[0]].detach(), _layout(site.site))
    rows = weight.reshape(-1, site.site.in_).contiguous()
    keep = site.keep.reshape(-1, site.site.in_).to(rows.device)
    pattern = parse_pattern(site.pattern)
    return format_for(pattern).pack(rows, keep, pattern, site.site.run)


def _stacked(weight: Tensor, site: Site) -> Tensor:
    return weight.reshape(site.groups, site.out, site.in_)


def _layout(site: Site) -> Layout:
    if site.layout is None:
        raise ExportError(f"site {site.name!r} has no matrix layout")
    return site.layout


def _describe_site(site: PrunedSite, packed: Packed) -> dict[str, Any]:
    layout = _layout(site.site)
    table: dict[str, Any] = {
        "kind": site.site.kind,
        "parameters": list(site.parameters),
        "shape": list(site.site.shape),
        "pattern": site.pattern,
        "packed": packed.layout,
        "tensors": sorted(packed.tensors),
        "run": site.site.run,
        "groups": site.site.groups,
        "kernel": site.kernel,
        "variants": site.variants,
        "calls": site.site.calls,
    }
    if isinstance(layout, MatmulLayout):
        return table | {"transposed": layout.transposed, "input_axis": layout.input_axis}
    return table | {
        "kernel_size": list(layout.kernel),
        "stride": list(layout.stride),
        "padding": [list(pair) for pair in layout.padding],
        "dilation": list(layout.dilation),
    }


def _read_site(
    where: str, name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[PrunedSite, Packed, Tensor]:
    """Return a site, its packed weight and its dense weight in the module's own shape. Raises ModelError."""
    _check(entry, _SITE | (_MATMUL if "transposed" in entry else _CONV), where)
    try:
        site = _site(name, entry)
        parts = {key: tensors[f"{site.parameter}::{key}"] for key in entry["tensors"]}
        packed = Packed(entry["packed"], parse_pattern(entry["pattern"]), (site.out * site.groups, site.in_), parts)
        keep = kept_entries(packed)[0].reshape(site.groups, site.out, site.in_)
        native = from_problem(_stacked(unpack(packed), site), _layout(site), site.shape)
    except KeyError as error:
        raise ModelError(f"{where} lacks its tensor {error}; compile it again") from None
    except (IndexError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ModelError(f"{where}: its numbers contradict each other ({error}); compile it again") from None
    parameters, kernel, variants = tuple(entry["parameters"]), entry["kernel"], entry["variants"]
    return PrunedSite(site, entry["pattern"], keep, parameters, kernel, variants), packed, native


def _site(name: str, entry: Mapping[str, Any]) -> Site:
    layout: Layout
    shape = tuple(entry["shape"])
    if "transposed" in entry:
        layout = MatmulLayout(entry["transposed"], entry["input_axis"])
        out, in_ = (shape[1], shape[0]) if layout.transposed else (shape[0], shape[1])
    else:
        padding = tuple((begin, end) for begin, end in entry["padding"])
        kernel = tuple(entry["kernel_size"])
        layout = ConvLayout(kernel, tuple(entry["stride"]), padding, tuple(entry["dilation"]), entry["groups"])
        out, in_ = shape[0] // entry["groups"], torch.Size(kernel).numel() * shape[1]
    return Site(
        name=name,
        kind=entry["kind"],
        parameter=entry["parameters"][0],
        shape=shape,
        out=out,
        in_=in_,
        groups=entry["groups"],
        run=entry["run"],
        layout=layout,
        reads="",
        segment=0,
        calls=entry["calls"],
    )


def _check(table: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    """Raise ModelError where a key is missing or its value of another kind: a type, [each's] or {each value's}."""
    for key, kind in kinds.items():
        if key not in table:
            raise ModelError(f"{where}: {key!r} is missing; compile it again")
        if not _fits(table[key], kind):
            raise ModelError(f"{where}: {key!r} cannot be {json.dumps(table[key])[:60]}; compile it again")


def _fits(value: object, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(entry, kind[0]) for entry in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(entry, kind[""]) for entry in value.values())
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
