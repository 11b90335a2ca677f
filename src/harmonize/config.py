"""From words on the command line to a checked configuration, and from there to objects.

Together with ``cli.py`` the only place that knows Hydra. Importing it loads neither torch nor lightning, so that a typo
is answered at once.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import itertools
import keyword
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from harmonize.files import digest
from harmonize.rules import OPTIONAL, PARTS, get, is_number, show, violations
from harmonize.types import ConfigError

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override

_PACKAGE = Path(__file__).resolve().parent
# In a wheel conf/ lies inside the package, in a checkout at the root.
CONF = next((d for d in (_PACKAGE / "conf", _PACKAGE.parents[1] / "conf") if d.is_dir()), _PACKAGE / "conf")

# Keys that change where and how a run computes and is shown, its result by no more than rounding: they do not take part
# in the name of its folder.
NEUTRAL = (
    "run",
    "scale",
    "evaluate",
    "logger",
    "hydra",
    "data.num_workers",
    "data.augment",
    "data.shard_cache_gb",
    "data.dataset.shard_cache_gb",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.progress",
    "trainer.save_every_minutes",
    "trainer.max_skipped_steps",
    "diagnostics",
)


# ---- composing -----------------------------------------------------------------------------------------------------


def compose(overrides: Sequence[str] = (), command: str = "train") -> DictConfig:
    """The configuration that ``harmonize <command> <overrides>`` runs with (unchecked: see :func:`check_config`).

    Args:
        overrides: As on the command line, for example ``["loss=hybrid", "loss.lambda=0.2"]``.
        command: ``train``, ``analyze``, ``evaluate``, ``inspect`` or ``export``.

    Raises:
        ConfigError: An override names a group, a choice or a key that does not exist, or cannot be read.
    """
    with composer(command) as conf:
        return finish(conf.load(overrides))


def launcher_of(overrides: Sequence[str], command: str = "train") -> dict[str, Any]:
    """The options of the launcher that a sweep with these overrides would be started with."""
    with composer(command) as conf:
        found = conf.load(overrides)
        return OmegaConf.to_container(found.hydra.launcher, resolve=False)  # type: ignore[return-value]


@contextmanager
def composer(command: str = "train") -> Iterator[Composer]:
    """Composes any number of configurations from ``conf/<command>.yaml``, also within a job or another composer."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # Hydra itself allows one at a time
    try:
        with initialize_config_dir(str(CONF), job_name=command, version_base="1.3"):
            yield Composer(GlobalHydra.instance().config_loader(), command, _memory_of(command, _stamp()))
    finally:
        GlobalHydra.instance().hydra = outer


@dataclass
class _Memory:
    """What has been read of the files that the groups offer."""

    composed: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)
    names: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    groups: dict[tuple[str, ...], dict[str, list[str]]] = field(default_factory=dict)


@lru_cache(maxsize=8)
def _memory_of(command: str, stamp: int) -> _Memory:
    """What this process has read of ``conf/`` for a command, until a file changes."""
    return _Memory()


def _stamp() -> int:
    """Another number after any file of ``conf/`` has come, gone or changed."""
    return hash(tuple(sorted((str(path), path.stat().st_mtime_ns) for path in CONF.rglob("*.yaml"))))


def finish(config: DictConfig, hydra: Any = None) -> DictConfig:
    """Replace Hydra's own node by what only it knows.

    That is null for every section that may be left out and is, and ``run.name``: for training the readable part of the
    run folder's name, for an evaluation its protocol.

    Args:
        config: The composed configuration; changed in place.
        hydra: Hydra's node, if it is not in the configuration.
    """
    hydra = config.hydra if hydra is None else hydra
    command, chosen = hydra.job.config_name, hydra.runtime.choices
    with open_dict(config):
        config.pop("hydra", None)
        for section in OPTIONAL[command]:
            config.setdefault(section, None)
        groups = {"train": ("loss", "data", "backbone"), "evaluate": ("eval",)}.get(command, ())
        if groups and config.get("run") is not None:
            config.run.name = "-".join(Path(str(chosen[group])).name for group in groups)
    return config


class Composer:
    """Composes configurations, and says in plain words what is wrong with overrides.

    Hydra's own messages name neither the nearest key nor the choices, and it takes a typo for an addition where the
    user wrote ``+key`` or an experiment's file. So overrides are held against what the chosen files spell, first.
    """

    def __init__(self, conf: ConfigLoader, command: str, memory: _Memory) -> None:
        self._conf = conf
        self._command = command
        self._search: list[str] = []  # the override that names folders besides conf/
        self._of_conf, self._of_search = memory, _Memory()

    def load(self, overrides: Sequence[str]) -> DictConfig:
        """The composed configuration, with Hydra's own node.

        Raises:
            ConfigError: Naming everything that is wrong with the overrides.
        """
        overrides = self.without_null(overrides)
        parsed = self.parse(overrides)
        self._search = [_text(o) for o in parsed if o.key_or_group == "hydra.searchpath"]
        groups = [o for o in parsed if self._is_group(o)]
        _refuse([self._choice(o) for o in groups])
        files = self._files(groups)
        _refuse([self._key(o, files) for o in parsed if o not in groups])
        _refuse(self._experiment(groups, files))
        read = self._known.composed.get(self._all(overrides))
        return self._compose(overrides) if read is None else copy.deepcopy(read)

    def without_null(self, overrides: Sequence[str]) -> list[str]:
        """Overrides with ``group=null`` in Hydra's own words, for the groups that can be left out."""
        return [f"~{o[:-5]}" if o in {f"{group}=null" for group in OPTIONAL[self._command]} else o for o in overrides]

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Overrides in Hydra's grammar.

        Raises:
            ConfigError: Naming all that cannot be read.
        """
        parser, parsed, problems = OverridesParser.create(config_loader=self._conf), [], []
        for text in overrides:
            try:
                parsed += parser.parse_overrides([text])
            except HydraException:
                hint = "; lists are written [1,2], and special characters need quotes" if "=" in text else ""
                problems.append(f"Could not parse {text!r}: a setting is written key=value{hint}.")
        for o in parsed:
            group = o.key_or_group
            if o.is_discrete_sweep() and group in OPTIONAL[self._command] and "null" in o.sweep_string_iterator():
                problems.append(f"{_text(o)}: null cannot be one of several choices; run {group}=null on its own.")
        _refuse(problems)
        return parsed

    def axes(self, overrides: Sequence[Override], first: DictConfig) -> list[list[str]]:
        """What a sweep combines: the overrides of each key, one for every value; the last mention of a key wins.

        Args:
            overrides: Of the command line.
            first: Composed from those that are no sweep; its files may name further values to sweep over.

        Raises:
            NotImplementedError: What is swept over is decided later, by a sweeper other than Hydra's own.
        """
        parameters = first.hydra.sweeper.get("params") or {}
        values: dict[str, list[str]] = {}
        for override in [*self.parse([f"{key}={value}" for key, value in parameters.items()]), *overrides]:
            key = override.get_key_element()
            if not override.is_sweep_override():
                values[key] = [override.input_line or ""]
            elif override.is_discrete_sweep():
                values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                raise NotImplementedError(key)
        return list(values.values())

    def folders(self, overrides: Sequence[str]) -> list[Path]:
        """The run folders of a command line, be it one run or a sweep."""
        parsed = self.parse(overrides)
        first = self.load([_text(o) for o in parsed if not o.is_sweep_override()])
        return [run_dir(finish(self.load(list(job)))) for job in itertools.product(*self.axes(parsed, first))]

    @property
    def _known(self) -> _Memory:
        return self._of_search if self._search else self._of_conf

    def _all(self, overrides: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*overrides, *self._search]))

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        try:
            return self._conf.load_configuration(self._command, list(self._all(overrides)), RunMode.RUN)
        except Exception as error:  # Hydra's exceptions have no common ancestor
            raise ConfigError(self._plainly(error)) from error

    def _spelled(self, choices: Sequence[str]) -> DictConfig:
        """What some choices of files compose to: once, to be read and not to be changed."""
        key, composed = self._all(choices), self._known.composed
        if key not in composed:
            if len(composed) == 256:  # some 80 MB
                composed.clear()
            composed[key] = self._compose(choices)
        return composed[key]

    def _files(self, groups: Sequence[Override]) -> DictConfig:
        """What the chosen files spell, before any value is set."""
        # A choice inside a choice (loss@loss.mim=mae) comes second: whether it can be made depends on the others.
        config = self._spelled([_text(o) for o in groups if o.package is None])
        nested = [o for o in groups if o.package is not None]
        if not nested:
            return config
        possible = [choice for choice in config.hydra.runtime.choices if "@" in choice]
        hint = f"possible here: {', '.join(possible)}" if possible else "no such choice is possible here"
        _refuse(
            f"{_text(o)} does not fit {_chosen(config, o.key_or_group)}; {hint}."
            for o in nested
            if not o.is_add() and o.get_key_element().lstrip("~") not in possible
        )
        return self._spelled([_text(o) for o in groups])

    def _is_group(self, override: Override) -> bool:
        """Whether an override chooses a file (``loss=mim``) rather than sets a value."""
        return not isinstance(override.value(), dict) and bool(self._names(override.key_or_group))

    def _names(self, group: str) -> list[str]:
        """All files of a group."""
        key = (group, *self._search)
        if key not in self._known.names:
            if self._search:
                names = self._conf.get_group_options(group, config_name=self._command, overrides=self._search)
            else:
                names = self._conf.get_group_options(group)
            self._known.names[key] = names
        return self._known.names[key]

    def _options(self, group: str) -> list[str]:
        """Those that are meant to be chosen."""
        return [name for name in self._names(group) if not name.startswith("_")]

    def _choice(self, override: Override) -> str | None:
        """What is wrong with ``group=file``."""
        group, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            return _needs_multirun(override)
        if group in self._conf.list_groups("") and group not in self.groups():
            groups = ", ".join(self.groups())
            return f"{_text(override)}: harmonize {self._command} has no group {group}; it has {groups}."
        if override.is_delete() and value is None:
            return None
        for name in value if isinstance(value, list) else [value]:
            folder, _, file = f"{group}/{name}".rpartition("/")
            if not isinstance(name, str) or file not in self._names(folder):
                options = self._options(group)
                if override.package in PARTS:
                    fits, _ = PARTS[override.package]
                    options = [o for o in options if fits(self._spelled([f"{group}={o}"])[group])]
                return f"{_text(override)}: {group} must be one of {', '.join(options)}{_did_you_mean(name, options)}"
        return None

    def _key(self, override: Override, files: DictConfig) -> str | None:
        """What is wrong with ``key=value``."""
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            return _needs_multirun(override)
        if override.package is not None:
            return f"{_text(override)}: there is no group {key}{_did_you_mean(key, self.groups())}"
        adds = override.is_add() or override.is_force_add()
        node = _find(files, key)
        if node is _NOTHING:
            brings_component = isinstance(value, dict) and "_target_" in value
            return None if adds and (brings_component or _is_open(files, key)) else self._unknown(key, files)
        if not isinstance(node, DictConfig) or adds or override.is_delete() or value is None:
            return None
        if isinstance(value, dict):
            inside = (f"{key}.{k}" for k in _flatten(value))
            return next((self._unknown(k, files) for k in inside if not _is_open(files, k, targets=False)), None)
        group = next((c for c in files.hydra.runtime.choices if c.endswith(f"@{key}")), None)
        if group:
            return f"{_text(override)}: {key} is a section, whose file is chosen with {group}={show(value)}."
        some = ", ".join(f"{key}.{k}" for k in list(node)[:4])
        return f"{_text(override)}: {key} is a section, not a value; set a key of it ({some})."

    def _experiment(self, groups: Sequence[Override], files: DictConfig) -> list[str]:
        """The keys in an experiment's file that no other file spells; below a ``_target_``, the signature decides."""
        experiment = files.hydra.runtime.choices.get("experiment")
        if not experiment:
            return []
        added = {o.get_key_element().lstrip("+"): _text(o) for o in groups if o.is_add()}
        without = {group: text for group, text in (_choices(files) | added).items() if group != "experiment"}
        base = self._spelled(list(without.values()))
        new = sorted(set(_keys(files)) - set(_keys(base)))
        top = [key for key in new if not _is_open(base, key) and _is_open(base, key.rpartition(".")[0])]
        return [f"experiment={experiment}: {self._unknown(key, base)}" for key in top]

    def _unknown(self, key: str, files: DictConfig) -> str:
        """The sentence for a key that does not exist, with the nearest that do."""
        head, _, rest = key.partition(".")
        if head not in files and head in self.groups():
            options = ", ".join(self._options(head))
            return f"{key} can only be set where {head} is chosen: add {head}=NAME, one of {options}."
        above = key.rpartition(".")[0]
        parent = _find(files, above) if above else files
        if parent is not _NOTHING and not OmegaConf.is_config(parent):
            return f"Unknown key {key}: {above} is a value ({show(parent)}); write {above}={{...}} to give it keys."
        known = [k for k in _keys(files) if k.startswith("hydra.") == key.startswith("hydra.")] + list(self.groups())
        known = [k for k in dict.fromkeys(known) if not f"{key}.".startswith(f"{k}.")]
        near, sure = _nearest(key, known)
        elsewhere = self._elsewhere(key, files) if rest and head in files else {}
        if key in elsewhere:
            owners = elsewhere[key]
            place = owners[0].partition("=")[0]
            same = [k for k in known if k.startswith(f"{head}.") and k.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = f", which has {' and '.join(same)}" if same else ""
            return f"Unknown key {key}: it belongs to {' or '.join(owners)}, not to {_chosen(files, place)}{hint}."
        if not sure and elsewhere:
            there, sure = _nearest(key, list(elsewhere))
            near = [f"{k} ({elsewhere[k][0]})" for k in there] if sure else near
        if sure:
            return f"Unknown key {key}; did you mean {' or '.join(near)}?"
        return f"Unknown key {key}; the nearest is {near[0]}, and harmonize {self._command} --cfg job prints all."

    def _elsewhere(self, key: str, files: DictConfig) -> dict[str, list[str]]:
        """Key of the same section -> the other choices (``loss=hybrid``, ``loss@loss.mim=mim``) that have it."""
        found: dict[str, list[str]] = {}
        group = key.partition(".")[0]
        here, choices = set(_keys(files)), _choices(files)
        for place, chosen in choices.items():
            outer, _, package = place.partition("@")
            if outer != group or not key.startswith(f"{package}."[not package :]):
                continue
            rest = {g: text for g, text in choices.items() if package or "@" not in g}
            for name in self._options(group):
                if name in (chosen.partition("=")[2], choices[group].partition("=")[2]):
                    continue
                choice = f"{place}={name}"
                try:
                    other = self._spelled(list((rest | {place: choice}).values()))
                except ConfigError:  # a file that needs more than its name is no suggestion
                    continue
                for k in set(_keys(other)) - here:
                    if k.startswith(f"{group}."):
                        found.setdefault(k, []).append(choice)
        return found

    def groups(self) -> dict[str, list[str]]:
        """Group of this command -> its files."""
        key = tuple(self._search)
        if key not in self._known.groups:
            chosen = self._spelled([]).hydra.runtime.choices
            self._known.groups[key] = {g: self._options(g) for g in sorted(self._conf.list_groups("")) if g in chosen}
        return self._known.groups[key]

    def _plainly(self, error: Exception) -> str:
        """One sentence for any other complaint of Hydra."""
        file = getattr(error, "missing_cfg_file", None)
        if file:
            group, _, name = str(file).rpartition("/")
            if name == "submitit_slurm":
                return "hydra/launcher=slurm needs hydra-submitit-launcher: pip install 'harmonize[slurm]'."
            options = self._options(group)
            return f"There is no file {name}.yaml in conf/{group}; set {group}= to one of {', '.join(options)}."
        parts = [str(e).splitlines()[0].rstrip(".") for e in (error, error.__cause__) if e and str(e)]
        return ": ".join(parts) + "."


def _text(override: Override) -> str:
    """An override as the user wrote it."""
    assert override.input_line is not None
    return override.input_line


def _needs_multirun(override: Override) -> str:
    return f"{_text(override)} is several values: add -m to run each, or write a list as {override.key_or_group}=[...]."


def _choices(files: DictConfig) -> dict[str, str]:
    """Group -> the override that chooses what is chosen."""
    return {g: f"{g}={c}" for g, c in files.hydra.runtime.choices.items() if c and not g.startswith("hydra/")}


def _chosen(files: DictConfig, group: str) -> str:
    return f"{group}={show(files.hydra.runtime.choices.get(group))}"


def _refuse(problems: Iterable[str | None]) -> None:
    """Raise what is wrong, if anything is."""
    found = list(dict.fromkeys(p for p in problems if p))
    if found:
        raise ConfigError("\n".join(found))


# ---- checking ------------------------------------------------------------------------------------------------------


def evaluations(config: DictConfig, run_folder: Path) -> dict[str, DictConfig]:
    """What ``harmonize evaluate`` is to do with a finished run: entry of ``evaluate`` -> its configuration.

    An entry is a protocol and settings, as in ``fine_tune eval.epochs=20``. Its results go into a folder of the run
    folder, named after it; everything random is a function of the run's seed.

    Raises:
        ConfigError: An entry cannot be read, or names what does not exist.
    """
    found = {}
    for entry in config.evaluate:
        try:
            own = copy.deepcopy(_evaluation(entry))
        except ValueError as error:  # it cannot be split into words, or has a mistake in its settings
            raise ConfigError(_of_entry(entry, error)) from error
        own.checkpoint, own.names, own.seed = str(run_folder), [config.run.name], config.seed
        own.accelerator = config.trainer.accelerator
        own.run.root = str(run_folder / "evaluations")
        own.run.dir = str(run_folder / "evaluations" / re.sub(r"[^\w.]+", "-", entry)[:100].strip("-"))
        found[entry] = own
    return found


@cache
def _evaluation(entry: str) -> DictConfig:
    protocol, *settings = shlex.split(entry)
    return compose([f"eval={protocol}", *settings], "evaluate")


def _of_entry(entry: str, error: Exception) -> str:
    return "\n".join(f"evaluate, {entry!r}: {line}" for line in str(error).splitlines())


def check_config(config: DictConfig, machine: bool = True, command: str = "train") -> None:
    """Find every mistake before anything starts: values, relations, components and their arguments, devices, data.

    What needs no torch comes first, and alone if it finds something.

    Args:
        config: The composed configuration.
        machine: Whether this machine is the one that runs it (its devices and its data are looked at).
        command: The command that it is for.

    Raises:
        ConfigError: One sentence per mistake, one per line.
    """
    plain = to_plain(config)
    absent = list(_missing_devices(plain)) if machine else []
    _refuse([*absent, *violations(plain, [sentence.split()[0] for sentence in absent], command)])
    _refuse([*_misused(plain.get("data"), "data"), *(_missing_data(config) if machine else ())])
    for entry, own in evaluations(config, Path("run")).items() if command == "train" else ():
        try:
            check_config(own, machine, "evaluate")
        except ConfigError as error:
            raise ConfigError(_of_entry(entry, error)) from error
    _refuse(_misused(plain))  # last, because the backbone's libraries take the longest to load


def to_plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration as dictionaries, lists and values.

    Raises:
        ConfigError: A value refers to a key that does not exist, or one that must be given is missing.
    """
    try:
        plain = OmegaConf.to_container(
            config if isinstance(config, DictConfig) else OmegaConf.create(dict(config)),
            resolve=True,
            throw_on_missing=True,
        )
    except OmegaConfBaseException as error:
        key = error.full_key or "the configuration"
        raise ConfigError(f"{key} has no value: {str(error).splitlines()[0]}.") from error
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _misused(node: Any, path: str = "") -> Iterator[str]:
    """Every ``_target_`` that cannot be imported, and every key that it does not take."""
    if isinstance(node, list):
        for i, child in enumerate(node):
            yield from _misused(child, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        try:
            target = locate(node["_target_"])
            parameters = inspect.signature(target).parameters
        except (ImportError, TypeError, ValueError) as error:
            yield f"{path}._target_={node['_target_']} cannot be used: {' '.join(str(error).split())}"
            return
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in node:
            if not key.startswith("_") and not takes_any and _argument(key) not in parameters:
                known = [name.rstrip("_") for name in parameters]
                yield f"Unknown key {path}.{key}: {target.__name__} takes no {key}{_did_you_mean(key, known, path)}"
    for key, child in node.items():
        yield from _misused(child, f"{path}.{key}" if path else str(key))


def _missing_devices(plain: Mapping[str, Any]) -> Iterator[str]:
    """More devices than there are."""
    trains = "trainer" in plain
    prefix = "trainer." if trains else ""
    key, devices = f"{prefix}accelerator", f"{prefix}devices"
    wanted = get(plain, devices) if trains or "devices" in plain else 1
    accelerator = get(plain, key)
    if not is_number(wanted, whole=True) or (wanted <= 1 and accelerator != "gpu"):
        return
    num_gpus = 0
    if accelerator in ("gpu", "auto"):
        import torch

        num_gpus = torch.cuda.device_count()
    num_cores = os.cpu_count() or 1
    if accelerator == "gpu" and not num_gpus:
        yield f"{key} must be cpu or auto, not gpu: there is no GPU here."
    elif num_gpus and wanted > num_gpus:
        yield f"{devices} must be at most {num_gpus}, the number of GPUs here, not {wanted}."
    elif not num_gpus and wanted > num_cores:
        yield f"{devices} must be at most {num_cores}, the number of CPU cores here, not {wanted}."


def _missing_data(config: DictConfig) -> Iterator[str]:
    """A data set that is not there; its constructor looks for it and reads no image."""
    if config.get("data") is None:
        return
    try:
        instantiate(config.data.dataset)
    except ConfigError as error:
        yield str(error)


# ---- building ------------------------------------------------------------------------------------------------------


def instantiate(node: DictConfig | Mapping[str, Any], **kwargs: Any) -> Any:
    """Build the object that a node with a ``_target_`` describes, and everything inside it.

    As ``hydra.utils.instantiate`` (``_target_``, ``_partial_``, ``_args_``), with one rule more: a key that is a Python
    keyword goes to the argument of that name with an underscore (``lambda`` -> ``lambda_``). Arguments are handed on
    as they are: Hydra's own would turn a dataclass or a dictionary of modules into configuration nodes.

    Args:
        node: The node; values in it are handed over as plain containers.
        **kwargs: Further arguments of the outermost target; they win.

    Returns:
        The object; with ``_partial_: true`` a function that makes it.

    Raises:
        ConfigError: The constructor refuses a value; the message starts with the node's place in the configuration.

    >>> instantiate({"_target_": "fractions.Fraction", "numerator": 1}, denominator=4)
    Fraction(1, 4)
    """
    path = (node._get_full_key(None) or "") if isinstance(node, DictConfig) else ""
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    return _build(plain, path, kwargs)


def _build(node: Any, path: str, kwargs: Mapping[str, Any] | None = None) -> Any:
    if isinstance(node, list):
        return [_build(child, f"{path}[{i}]") for i, child in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    children = {k: _build(child, f"{path}.{k}" if path else k) for k, child in node.items()}
    if "_target_" not in children:
        return children
    target = locate(children.pop("_target_"))
    is_partial, positional = children.pop("_partial_", False), children.pop("_args_", ())
    arguments = {_argument(key): value for key, value in children.items()} | dict(kwargs or {})
    make = partial(_call, target, path)
    return partial(make, *positional, **arguments) if is_partial else make(*positional, **arguments)


def _call(target: Callable[..., Any], path: str, /, *args: Any, **kwargs: Any) -> Any:
    where = path or target.__qualname__
    try:
        inspect.signature(target).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{where}: {error} of {target.__qualname__}.") from error
    except ValueError:
        pass  # some functions written in C have no signature
    try:
        return target(*args, **kwargs)
    except ConfigError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        message = " ".join(str(error).split())
        names_argument = re.match(r"\w+=", message)  # which is then a key of the node
        raise ConfigError(f"{where}{'.' if names_argument else ': '}{message}") from error
    except Exception as error:
        raise RuntimeError(f"{where}: building {target.__qualname__} failed") from error


def _argument(key: str) -> str:
    """The argument that a key goes to.

    >>> _argument("lambda"), _argument("width")
    ('lambda_', 'width')
    """
    return f"{key}_" if keyword.iskeyword(key) else key


def locate(name: str) -> Any:
    """The class or function of a dotted name.

    Raises:
        ImportError: There is no such module, or nothing of that name in it.

    >>> locate("fractions.Fraction").__name__
    'Fraction'
    """
    above, _, attribute = str(name).rpartition(".")
    if not above:
        raise ImportError(f"{name!r} is not a dotted name such as package.module.Class")
    try:
        owner = importlib.import_module(above)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{above}.".startswith(f"{error.name}."):
            raise  # the module is there, but needs a package that is not
        owner = locate(above)
    if not hasattr(owner, attribute):
        public = [n for n in vars(owner) if not n.startswith("_")]
        raise ImportError(f"{above} has no {attribute}{_did_you_mean(attribute, public)}")
    return getattr(owner, attribute)


# ---- run folders ---------------------------------------------------------------------------------------------------


def run_dir(config: DictConfig | Mapping[str, Any]) -> Path:
    """The run folder: ``run.dir``, or a pure function of everything that changes the result.

    The same command therefore finds its own folder again, after a kill or on another day, and two different ones never
    meet. :data:`NEUTRAL` keys take no part.

    Returns:
        ``<run.root>/<loss>-<data>-<backbone>-<8 hex digits>`` unless ``run.dir`` is set.
    """
    run = to_plain(config)["run"]
    if run.get("dir"):
        return Path(run["dir"]).expanduser()
    return Path(run["root"]).expanduser() / f"{run.get('name', 'run')}-{digest(_result(config), 8)}"


def save_config(config: DictConfig | Mapping[str, Any], path: str | Path) -> None:
    """Write the resolved configuration as YAML, which :func:`load_config` reads back: whole or not at all.

    A file that says the same already is left alone.
    """
    path, content = Path(path), OmegaConf.to_yaml(OmegaConf.create(to_plain(config))).encode()
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def load_config(path: str | Path) -> DictConfig:
    """A configuration as :func:`save_config` wrote it."""
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def changed_keys(
    old: DictConfig | Mapping[str, Any], new: DictConfig | Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations and can change the result: key -> (old, new), None where it is absent.

    >>> changed_keys({"seed": 0, "run": {"root": "a"}}, {"seed": 1, "run": {"root": "b"}})
    {'seed': (0, 1)}
    """
    before, after = _result(old), _result(new)
    keys = sorted(set(before) | set(after))
    return {
        k: (before.get(k), after.get(k)) for k in keys if k not in before or before.get(k) != after.get(k, _NOTHING)
    }


def _result(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, without the neutral keys; 1.0 is 1, so that both name the same run."""

    def canonical(value: Any) -> Any:
        if isinstance(value, list):
            return [canonical(v) for v in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    leaves = _flatten(to_plain(config)).items()
    return {k: canonical(v) for k, v in leaves if not any(k == n or k.startswith(f"{n}.") for n in NEUTRAL)}


# ---- keys ----------------------------------------------------------------------------------------------------------

_NOTHING: Any = type("Nothing", (), {"__repr__": lambda self: "nothing"})()


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf; lists and empty sections are leaves.

    >>> _flatten({"a": {"b": 1, "c": [2]}})
    {'a.b': 1, 'a.c': [2]}
    """
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _keys(config: DictConfig) -> list[str]:
    """Every dotted key of a configuration, sections included, nothing resolved."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    leaves = [k for k in _flatten(plain) if not k.rpartition(".")[2].startswith("_")]  # type: ignore[arg-type]
    sections = {k[:i] for k in leaves for i, c in enumerate(k) if c == "."}
    return [*leaves, *sorted(sections)]


def _find(config: DictConfig, key: str) -> Any:
    """The node or value at a dotted key (``a.0`` and ``a[0]`` go into lists), or ``_NOTHING``."""
    node: Any = config
    for part in key.replace("[", ".").replace("]", "").split("."):
        if isinstance(node, DictConfig) and not node._is_none() and part in node:
            node = node._get_node(part)
        elif OmegaConf.is_list(node) and part.isdigit() and int(part) < len(node):
            node = node._get_node(int(part))
        else:
            return _NOTHING
    return node if OmegaConf.is_config(node) else node._value()


def _is_open(config: DictConfig, key: str, targets: bool = True) -> bool:
    """Whether a key exists or something above it may take it: a value (such as a schedule) or a ``_target_``."""
    node: Any = config
    for part in filter(None, key.split(".")):
        if not isinstance(node, DictConfig) or (targets and "_target_" in node):
            return True
        if part not in node:
            return False
        node = node._get_node(part)
    return True


def _nearest(word: str, known: Sequence[str], count: int = 3) -> tuple[list[str], bool]:
    """The keys that a word may have meant, best first, and whether they are near enough to ask.

    >>> _nearest("lambda", ["loss.lambda", "data.root"]), _nearest("loss.lamda", ["loss.lambda", "data.root"])
    ((['loss.lambda'], True), (['loss.lambda'], True))
    """
    likeness = {k: difflib.SequenceMatcher(None, word, k).ratio() for k in known}
    by_likeness = sorted(known, key=likeness.__getitem__, reverse=True)
    names = sorted({k.rpartition(".")[2] for k in known})
    name = difflib.get_close_matches(word.rpartition(".")[2], names, 1, cutoff=0.75)
    near = [k for k in by_likeness if k.rpartition(".")[2] in name]
    near = [k for k in near if likeness[k] >= 0.75] or near
    return (near[:count], True) if near else (by_likeness[:1], False)


def _did_you_mean(word: Any, known: Iterable[str], path: str = "") -> str:
    """The end of a sentence about a wrong word."""
    near = difflib.get_close_matches(str(word), list(known), 1, cutoff=0.5)
    return f"; did you mean {path + '.' if path else ''}{near[0]}?" if near else "."
