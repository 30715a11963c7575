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

# What rules_python asks of a Python since its first release: without these it would
# download one of its own beside the host's.
_MORE_TOOLCHAINS = """
load("@rules_python//python:py_exec_tools_toolchain.bzl", "py_exec_tools_toolchain")
load("@rules_python//python/cc:py_cc_toolchain.bzl", "py_cc_toolchain")

py_exec_tools_toolchain(name = "exec_tools")

toolchain(
    name = "exec_tools_toolchain",
    toolchain = ":exec_tools",
    toolchain_type = "@rules_python//python:exec_tools_toolchain_type",
)

py_cc_toolchain(
    name = "cc",
    headers = ":headers",
    python_version = "{version}",
)

toolchain(
    name = "cc_toolchain",
    toolchain = ":cc",
    toolchain_type = "@rules_python//python/cc:toolchain_type",
)
"""

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

# Where pip looks.
_PIP_VARIABLES = [
    "PIP_CERT",
    "PIP_CONFIG_FILE",
    "PIP_EXTRA_INDEX_URL",
    "PIP_FIND_LINKS",
    "PIP_INDEX_URL",
]

def _nnx_python_impl(rctx):
    name = rctx.os.environ.get("NNX_PYTHON", "") or "python3"
    python = rctx.path(name) if "/" in name else rctx.which(name)
    if not python or not python.exists:
        fail("`%s` was not found: install python3, python3-dev and python3-pip, or name another interpreter with --repo_env=NNX_PYTHON=..." % name)
    result = rctx.execute([python, rctx.path(rctx.attr._probe)], environment = _ENVIRONMENT)
    if result.return_code:
        fail("`%s` does not run as a Python: name another interpreter with --repo_env=NNX_PYTHON=...\n%s" % (python, result.stderr))
    found = json.decode(result.stdout)
    if found["refusal"]:
        fail(found["refusal"])
    rctx.symlink(found["include"], "include")
    rctx.file("python.json", json.encode({
        "executable": found["executable"],
        "version": found["version"],
    }))
    rctx.file("python.bzl", "PYTHON = %s\nPYTHON_TAG = %s\n" % (
        repr(str(found["executable"])),
        repr("cpython-%d%d" % tuple(found["version"])),
    ))
    build = _PYTHON_BUILD + (_MORE_TOOLCHAINS if rctx.attr.more_toolchains else "")
    rctx.file("BUILD.bazel", build.format(
        python = found["executable"],
        version = "%d.%d" % tuple(found["version"]),
    ))

nnx_python = repository_rule(
    doc = """The host's python3, or the one that --repo_env=NNX_PYTHON names.

Refuses, in one sentence, an interpreter that the lock files do not serve or
that has no headers to build extension modules with.""",
    implementation = _nnx_python_impl,
    attrs = {
        "more_toolchains": attr.bool(
            doc = "Whether rules_python is 1.3 or later, which asks for more.",
        ),
        "_probe": attr.label(
            default = Label("//tools/build_defs:python_probe.py"),
            allow_single_file = True,
        ),
    },
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
    locks = rctx.attr.locks
    if rctx.attr.device_variable and rctx.getenv(rctx.attr.device_variable) == "1":
        locks = rctx.attr.device_locks
    for label, oldest in locks.items():
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
    # A quarter of it all are tests, which nobody imports.
    rctx.report_progress("compiling byte code")
    rctx.execute(
        [
            python,
            "-m",
            "compileall",
            "-qq",
            "-j0",
            "-x",
            "/tests/",
            "--invalidation-mode=unchecked-hash",
            "site",
        ],
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
        "device_locks": attr.label_keyed_string_dict(
            allow_files = True,
            doc = "Taken in place of `locks` where `device_variable` is 1.",
        ),
        "device_variable": attr.string(
            doc = "A variable for --repo_env.",
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
    environ = _PIP_VARIABLES,
)

# The modules that pip calls of what a source distribution is built with.
_BACKENDS = {
    "hatchling": "build",
    "setuptools": "build_meta",
}

_SOURCES_BUILD = """
filegroup(
    name = "{name}",
    srcs = ["{folder}"],
    visibility = ["//visibility:public"],
)
"""

def _pypi_sources_impl(rctx):
    python = json.decode(rctx.read(rctx.attr._python))["executable"]
    for package, module in _BACKENDS.items():
        rctx.file("backends/%s/__init__.py" % package)
        rctx.symlink(rctx.attr._backend, "backends/%s/%s.py" % (package, module))
    environment = _ENVIRONMENT | {"PYTHONPATH": str(rctx.path("backends"))}
    build = ""
    for line in rctx.read(rctx.attr.lock).splitlines():
        if not line or line.startswith("#"):
            continue

        # Each by itself: a lock may have two versions of one distribution.
        rctx.report_progress("pip download %s" % line.split(" ")[0])
        rctx.file("requirement.txt", line)
        result = rctx.execute(
            [
                python,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--require-hashes",
                "--no-binary=:all:",
                "--no-build-isolation",
                "--disable-pip-version-check",
                "--dest=archive",
                "--requirement=requirement.txt",
            ],
            environment = environment,
            timeout = 1800,
        )
        if result.return_code:
            fail("pip could not download `%s`:\n%s" % (line, result.stderr))
        (archive,) = rctx.path("archive").readdir()
        folder = archive.basename.removesuffix(".tar.gz")
        rctx.extract(archive)
        rctx.delete("archive")
        build += _SOURCES_BUILD.format(
            name = folder.replace("-", "_").replace(".", "_"),
            folder = folder,
        )
    rctx.file("BUILD.bazel", build)

pypi_sources = repository_rule(
    doc = """Source distributions, unpacked, as `@<name>//:<distribution>_<version>`.

For their tests, which wheels leave out: nothing is built of them or run.""",
    implementation = _pypi_sources_impl,
    attrs = {
        "lock": attr.label(
            mandatory = True,
            allow_single_file = True,
            doc = "Lines `name==version --hash=sha256:...`.",
        ),
        "_backend": attr.label(
            default = Label("//tools/build_defs:pkg_info_backend.py"),
            allow_single_file = True,
        ),
        "_python": attr.label(
            default = Label("@nnx_python//:python.json"),
            allow_single_file = True,
        ),
    },
    environ = _PIP_VARIABLES,
)
