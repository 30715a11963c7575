"""External repositories: the host's Python, the locked PyPI packages, CUDA.

`nnx_repositories()` serves WORKSPACE files, the extension `nnx_deps` bzlmod.
"""

load("@bazel_tools//tools/build_defs/repo:http.bzl", "http_archive")
load("//tools/build_defs:cuda_toolkit.bzl", "nnx_cuda")
load("//tools/build_defs:pypi.bzl", "nnx_python", "pypi_packages", "pypi_sources")

def _locks(stem):
    # A lock file serves its version of Python and, up to the next one, later ones.
    return {
        Label("//tools/build_defs:%s_3_11.txt" % stem): "3.11",
        Label("//tools/build_defs:%s_3_12.txt" % stem): "3.12",
    }

# Fetched lazily, each when the first target that needs it is built.
_HUBS = {
    "pypi": "requirements_lock",
    "pypi_docs": "requirements_docs_lock",
    "pypi_ecosystem": "requirements_ecosystem_lock",
    "pypi_gpu": "requirements_gpu_lock",
    "pypi_llm": "requirements_llm_lock",
    "pypi_tpu": "requirements_tpu_lock",
}

# To compile for a GPU takes a fraction of the packages that running on it does:
# --repo_env=NNX_GPU_DEVICE=1 (part of --config=gpu_device) fetches them all.
_DEVICE_HUBS = {
    "pypi_gpu": ("NNX_GPU_DEVICE", "requirements_gpu_device_lock"),
}

def _packages(hub, stem):
    variable, device_stem = _DEVICE_HUBS.get(hub, ("", ""))
    pypi_packages(
        name = hub,
        locks = _locks(stem),
        device_locks = _locks(device_stem) if device_stem else {},
        device_variable = variable,
    )

def _sources():
    pypi_sources(
        name = "pypi_ecosystem_sources",
        lock = Label("//tools/build_defs:requirements_ecosystem_sources.txt"),
    )

# buildifier: disable=unnamed-macro
def nnx_repositories():
    """Declares what this workspace needs; for a WORKSPACE file.

    A repository that is already declared is left as it is: a monorepo with its
    own `@pypi` hub or rules_python declares them before it calls this.
    """
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
    for hub, stem in _HUBS.items():
        if not native.existing_rule(hub):
            _packages(hub, stem)
    if not native.existing_rule("pypi_ecosystem_sources"):
        _sources()
    if not native.existing_rule("nnx_cuda"):
        nnx_cuda(name = "nnx_cuda")

def _nnx_deps_impl(_module_ctx):
    nnx_python(
        name = "nnx_python",
        more_toolchains = True,
    )
    for hub, stem in _HUBS.items():
        _packages(hub, stem)
    _sources()
    nnx_cuda(name = "nnx_cuda")

nnx_deps = module_extension(
    doc = """The same repositories for bzlmod.

A monorepo puts its own in place with `override_repo(nnx_deps, pypi = "...")`.""",
    implementation = _nnx_deps_impl,
)
