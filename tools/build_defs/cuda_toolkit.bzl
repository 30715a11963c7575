"""The repository of the CUDA toolkit.

Apart from the rule that uses it: WORKSPACE files load this one before they know
rules_cc.
"""

_TOOLKIT_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

exports_files(["toolkit/bin/nvcc"])

filegroup(
    name = "compiler",
    srcs = glob(
        [
            "toolkit/bin/*",
            "toolkit/bin/crt/**",
            "toolkit/include/**",
            "toolkit/nvvm/**",
            "toolkit/targets/*/include/**",
        ],
        exclude = ["**/* *"],
        allow_empty = True,
    ),
)

# For host code; linked statically, so that nothing depends on where CUDA is.
cc_library(
    name = "runtime",
    srcs = ["{library}"],
    hdrs = glob(["toolkit/include/*.h", "toolkit/include/crt/*"]),
    includes = ["toolkit/include"],
    linkopts = ["-ldl", "-lpthread", "-lrt"],
)
"""

_LIBRARY_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")

def _nnx_cuda_impl(rctx):
    name = rctx.os.environ.get("NNX_CUDA", "")
    if name:
        root = rctx.path(name)
    else:
        root = rctx.path(rctx.attr._packages).dirname.get_child("site").get_child("nvidia").get_child("cu13")
    if not root.get_child("bin").get_child("nvcc").exists:
        fail("`%s` must be a CUDA toolkit, but has no bin/nvcc: name one with --repo_env=NNX_CUDA=..., or leave that out to take the one that is locked" % root)
    rctx.symlink(root, "toolkit")
    for folder in _LIBRARY_FOLDERS:
        library = "toolkit/%s/libcudart_static.a" % folder
        if rctx.path(library).exists:
            rctx.file("BUILD.bazel", _TOOLKIT_BUILD.format(library = library))
            return
    fail("`%s` has no libcudart_static.a: install the whole CUDA toolkit, or leave out --repo_env=NNX_CUDA" % root)

nnx_cuda = repository_rule(
    doc = """The CUDA toolkit that --repo_env=NNX_CUDA names, or the locked one of @pypi_gpu.""",
    implementation = _nnx_cuda_impl,
    attrs = {
        "_packages": attr.label(
            default = Label("@pypi_gpu//:BUILD.bazel"),
            allow_single_file = True,
        ),
    },
    environ = ["NNX_CUDA"],
)
