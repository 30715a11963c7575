"""The rule that compiles kernels with the CUDA toolkit."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain", "use_cpp_toolchain")
load("@rules_cc//cc/common:cc_common.bzl", "cc_common")
load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")

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
