"""Repository rules for the host's Python interpreter and for PyPI packages."""

_PYTHON_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_runtime", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

exports_files(["python.json"])

py_runtime(
    name = "runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
    stub_shebang = "#!{python}",
)

py_runtime_pair(
    name = "runtime_pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtime_pair",
    toolchain_type = "@rules_python//python:toolchain_type",
)

cc_library(
    name = "headers",
    hdrs = glob(["include/**/*.h"]),
    includes = ["include"],
)
"""

# sys.executable is the interpreter itself, not a shim that leads to it.
_PROBE = """\
import json, sys, sysconfig
print(json.dumps({
    "executable": sys.executable,
    "include": sysconfig.get_path("include"),
    "implementation": sys.implementation.name,
    "version": sys.version_info[:2],
    "full_version": sys.version.split()[0],
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
}))
"""

_OLDEST = [3, 11]

# A clean environment: what the user's shell sets for Python must not change
# what is found or where pip installs.
_ENVIRONMENT = {
    "PIP_BREAK_SYSTEM_PACKAGES": "1",  # --target touches no system package
    "PIP_NO_WARN_SCRIPT_LOCATION": "1",
    "PIP_REQUIRE_VIRTUALENV": "0",
    "PIP_USER": "0",
    "PYTHONHOME": "",
    "PYTHONPATH": "",
    "PYTHONSAFEPATH": "1",
    "PYTHONWARNINGS": "",
}

def _nnx_python_impl(rctx):
    asked = rctx.os.environ.get("NNX_PYTHON", "")
    name = asked or "python3"
    how = "install python3 (3.11 or later) with its headers and pip, or name another interpreter with --repo_env=NNX_PYTHON=..."
    python = rctx.path(name) if "/" in name else rctx.which(name)
    if not python or not python.exists:
        fail("`%s` was not found: %s" % (name, how))
    result = rctx.execute([python, "-c", _PROBE], environment = _ENVIRONMENT)
    if result.return_code:
        fail("`%s` is not a Python that runs: %s\n%s" % (python, how, result.stderr))
    found = json.decode(result.stdout)
    version = [int(v) for v in found["version"]]
    if found["implementation"] != "cpython" or found["free_threaded"] or version < _OLDEST:
        fail("CPython 3.11 or later (with the global lock) is needed, but `%s` is %s %s: %s" % (
            python,
            found["implementation"],
            found["full_version"],
            how,
        ))
    include = rctx.path(found["include"])
    if not include.get_child("Python.h").exists:
        fail("`%s` has no headers (no Python.h in `%s`): install its development package, such as Debian's python%d.%d-dev, or name another interpreter with --repo_env=NNX_PYTHON=..." % (
            python,
            include,
            version[0],
            version[1],
        ))
    rctx.symlink(include, "include")
    rctx.file("python.json", json.encode({
        "executable": found["executable"],
        "version": version,
    }))
    rctx.file("BUILD.bazel", _PYTHON_BUILD.format(python = found["executable"]))

nnx_python = repository_rule(
    doc = """The host's python3, or the one that --repo_env=NNX_PYTHON names.

Refuses, in one sentence, an interpreter that the lock files do not serve or
that has no headers to build extension modules with.""",
    implementation = _nnx_python_impl,
    environ = ["NNX_PYTHON", "PATH"],
    configure = True,
    local = True,
)

def _pypi_packages_impl(rctx):
    interpreter = json.decode(rctx.read(rctx.attr._python))
    python = interpreter["executable"]
    version = [int(v) for v in interpreter["version"]]

    # The newest lock file whose version is not newer than the interpreter.
    lock, best = None, []
    for label, oldest in rctx.attr.locks.items():
        oldest = [int(v) for v in oldest.split(".")]
        if best < oldest and oldest <= version:
            lock, best = rctx.path(label), oldest
    if not lock:
        fail("no lock file of @%s serves Python %s: name another interpreter with --repo_env=NNX_PYTHON=..." % (rctx.name, version))

    rctx.report_progress("pip install -r %s" % lock.basename)
    result = rctx.execute(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
            "--no-compile",
            "--disable-pip-version-check",
            "--root-user-action=ignore",
            "--no-warn-conflicts",
            "--target=site",
            "--requirement=%s" % lock,
        ],
        environment = _ENVIRONMENT,
        timeout = 1800,
    )
    if result.return_code:
        fail("pip could not install %s with `%s` (it needs pip, as in Debian's python3-pip, and a way to PyPI or a mirror of it):\n%s" % (
            lock.basename,
            python,
            result.stderr,
        ))

    # A test cannot write byte code into the repository, so it is made here, once,
    # and by hash, so that the files are the same on every machine.  Some packages
    # carry files that are no Python of this version: the status says nothing.
    rctx.report_progress("compiling byte code")
    rctx.execute(
        [python, "-m", "compileall", "-qq", "-j0", "--invalidation-mode=unchecked-hash", "site"],
        environment = _ENVIRONMENT,
        timeout = 1800,
    )
    result = rctx.execute([python, rctx.path(rctx.attr._build), "site"], environment = _ENVIRONMENT)
    if result.return_code:
        fail(result.stderr)

pypi_packages = repository_rule(
    doc = """The distributions of a lock file, as `@<name>//<distribution>`.

Labels are those of rules_python's hub (`@pypi//jax`, `@pypi//absl_py`), and so
a hub made by rules_python can take the place of this one.""",
    implementation = _pypi_packages_impl,
    attrs = {
        "locks": attr.label_keyed_string_dict(
            mandatory = True,
            allow_files = True,
            doc = "Hash-pinned requirements file: oldest Python it serves.",
        ),
        "_build": attr.label(
            default = Label("//tools/build_defs:pypi_build.py"),
            allow_single_file = True,
        ),
        "_python": attr.label(
            default = Label("@nnx_python//:python.json"),
            allow_single_file = True,
        ),
    },
    environ = [
        "PIP_CERT",
        "PIP_CONFIG_FILE",
        "PIP_EXTRA_INDEX_URL",
        "PIP_FIND_LINKS",
        "PIP_INDEX_URL",
    ],
)
