"""Byte code of Python sources, so that programs need not compile them.

A test cannot write byte code beside the sources that it imports, nor does a
program in a read-only tree, and so both would compile every module each time.
"""

load("@nnx_python//:python.bzl", "PYTHON", "PYTHON_TAG")

def _py_byte_code_impl(ctx):
    package = ctx.label.package
    outputs, arguments = [], []
    for src in ctx.files.srcs:
        if not src.is_source or src.extension != "py" or src.owner.package != package:
            continue
        directory = src.owner.name.rpartition("/")[0]
        output = ctx.actions.declare_file("%s__pycache__/%s.%s.pyc" % (
            directory + "/" if directory else "",
            src.basename[:-len(".py")],
            PYTHON_TAG,
        ))
        outputs.append(output)
        arguments += [src.path, output.path]
    if outputs:
        ctx.actions.run(
            # Neither the site's packages nor the user's settings: what comes out
            # depends on the sources alone.  What the compiler warns of is an error,
            # since tests do not get to see it.
            executable = PYTHON,
            arguments = ["-I", "-S", "-Werror", ctx.file._program.path] + arguments,
            inputs = [ctx.file._program] + ctx.files.srcs,
            outputs = outputs,
            mnemonic = "PyByteCode",
            progress_message = "Compiling byte code of %{label}",
        )
    return [DefaultInfo(files = depset(outputs))]

py_byte_code = rule(
    doc = """The byte code of sources of this package, where Python looks for it.

It holds for the host's Python.  Another one, which a monorepo may run, finds no
byte code under its own name and compiles the sources as ever.""",
    implementation = _py_byte_code_impl,
    attrs = {
        "srcs": attr.label_list(
            allow_files = [".py"],
            doc = "The sources; those of other packages are passed over.",
        ),
        "_program": attr.label(
            default = Label("//tools/build_defs:byte_code.py"),
            allow_single_file = True,
        ),
    },
)
