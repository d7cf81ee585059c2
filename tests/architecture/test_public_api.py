"""What the package offers is exactly what its manifest says; whoever changes it sees it here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import coalestra
from tests.architecture.public_api import describe_package, differences, recorded, rendered
from tests.support import PUBLIC

PACKAGE_HOME = Path(str(coalestra.__file__)).parents[1]


def test_the_package_offers_exactly_what_its_manifest_says() -> None:
    """To accept a change: ``python tests/architecture/public_api.py --write``."""
    assert differences(recorded(), json.loads(rendered(describe_package()))) == []


def test_every_exported_name_exists_once() -> None:
    names = list(PUBLIC)
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(coalestra, name)] == []


def test_nothing_is_public_by_accident() -> None:
    modules = {name for name in sys.modules if name.startswith("coalestra.")}
    stray = [
        name
        for name in vars(coalestra)
        if not name.startswith("_") and name not in PUBLIC and f"coalestra.{name}" not in modules
    ]
    assert set(stray) <= {"annotations", "TYPE_CHECKING"}


def test_a_star_import_brings_every_public_name() -> None:
    namespace: dict[str, object] = {}
    exec("from coalestra import *", namespace)
    assert set(PUBLIC) - {"__version__"} <= set(namespace)


def test_importing_the_package_starts_no_thread_and_no_loop() -> None:
    program = (
        f"import sys, threading; sys.path.insert(0, {str(PACKAGE_HOME)!r}); "
        "from coalestra import *; assert threading.active_count() == 1; "
        "assert 'multiprocessing' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-W", "error", "-c", program], check=True)
