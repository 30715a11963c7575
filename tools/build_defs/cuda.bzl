"""The CUDA toolkit, and the rule that compiles kernels with it."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain", "use_cpp_toolchain")

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

# Machine code for each generation, and PTX that drivers compile for later ones.
_ARCHITECTURES = ("75", "80", "90", "100", "120")
_PTX = "120"

_NVCC_FLAGS = [
    "-x",
    "cu",
    "-std=c++17",
    "-O3",
    "-Werror=all-warnings",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror",
] + [
    "-gencode=arch=compute_%s,code=sm_%s" % (arch, arch)
    for arch in _ARCHITECTURES
] + ["-gencode=arch=compute_%s,code=compute_%s" % (_PTX, _PTX)]

def _cuda_objects_impl(ctx):
    cc = find_cpp_toolchain(ctx)
    context = cc_common.merge_compilation_contexts(
        compilation_contexts = [dep[CcInfo].compilation_context for dep in ctx.attr.deps],
    )
    objects = []
    for src in ctx.files.srcs:
        out = ctx.actions.declare_file("%s/%s.o" % (ctx.label.name, src.basename))
        objects.append(out)
        args = ctx.actions.args()
        args.add_all(_NVCC_FLAGS)
        args.add(cc.compiler_executable, format = "-ccbin=%s")
        args.add_all(context.defines, before_each = "-D")
        args.add_all(context.quote_includes, before_each = "-I")
        args.add_all(context.includes, before_each = "-I")
        args.add_all(context.system_includes, before_each = "-isystem")
        args.add("-c")
        args.add(src)
        args.add("-o", out)
        ctx.actions.run(
            executable = ctx.file._nvcc,
            arguments = [args],
            inputs = depset(
                [src],
                transitive = [context.headers, depset(ctx.files._compiler), cc.all_files],
            ),
            outputs = [out],
            mnemonic = "CudaCompile",
            progress_message = "Compiling CUDA %s" % src.short_path,
            use_default_shell_env = True,
        )
    return [DefaultInfo(files = depset(objects))]

cuda_objects = rule(
    doc = "Kernels compiled by nvcc, as objects that a library can have among its `srcs`.",
    implementation = _cuda_objects_impl,
    attrs = {
        "srcs": attr.label_list(allow_files = [".cu.cc"], mandatory = True),
        "deps": attr.label_list(providers = [CcInfo]),
        "_cc_toolchain": attr.label(default = Label("@bazel_tools//tools/cpp:current_cc_toolchain")),
        "_compiler": attr.label(default = Label("@nnx_cuda//:compiler")),
        "_nvcc": attr.label(
            default = Label("@nnx_cuda//:toolkit/bin/nvcc"),
            allow_single_file = True,
        ),
    },
    fragments = ["cpp"],
    toolchains = use_cpp_toolchain(),
)
