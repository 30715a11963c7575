"""External repositories: the host's Python and the locked PyPI packages.

Every repository is left alone where the workspace has already declared one of
the same name: a monorepo that has its own `@pypi` hub, or its own rules_python,
declares it before it calls `nnx_repositories()`.
"""

load("@bazel_tools//tools/build_defs/repo:http.bzl", "http_archive")
load("//tools/build_defs:pypi.bzl", "nnx_python", "pypi_packages")

# One lock file an oldest version of Python that it serves.
LOCKS = {
    "//tools/build_defs:requirements_lock_3_11.txt": "3.11",
    "//tools/build_defs:requirements_lock_3_12.txt": "3.12",
}

def nnx_repositories():
    """Declares what this workspace needs; for a WORKSPACE file."""
    if not native.existing_rule("rules_python"):
        http_archive(
            name = "rules_python",
            sha256 = "a5640fddd4beb03e8c1fde5ed7160c0ba6bd477e7d048661c30c06936a26fd63",
            strip_prefix = "rules_python-0.22.1",
            url = "https://github.com/bazelbuild/rules_python/archive/refs/tags/0.22.1.tar.gz",
        )
    if not native.existing_rule("nnx_python"):
        nnx_python(name = "nnx_python")
        native.register_toolchains("@nnx_python//:toolchain")
    if not native.existing_rule("pypi"):
        pypi_packages(
            name = "pypi",
            locks = {Label(lock): version for lock, version in LOCKS.items()},
        )
