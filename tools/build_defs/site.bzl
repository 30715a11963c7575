"""The rule behind `//docs`."""

def _site_impl(ctx):
    out = ctx.actions.declare_directory(ctx.attr.folder)
    ctx.actions.run(
        executable = ctx.executable._program,
        arguments = ["--output", out.path],
        inputs = ctx.files.srcs,
        outputs = [out],
        env = {"HOME": "/tmp", "JAX_PLATFORMS": "cpu"},
        mnemonic = "Site",
        progress_message = "Writing %{output}",
        use_default_shell_env = True,
    )
    return [DefaultInfo(files = depset([out]), runfiles = ctx.runfiles([out]))]

site = rule(
    doc = "A folder of HTML, made of pages and of the docstrings of our packages.",
    implementation = _site_impl,
    attrs = {
        "srcs": attr.label_list(
            mandatory = True,
            allow_files = [".md"],
            doc = "The pages; //tools/docs:contents says in which order.",
        ),
        "folder": attr.string(
            default = "site",
            doc = "The name of the folder.",
        ),
        # For the target: our extensions need not be built a second time.
        "_program": attr.label(
            default = Label("//tools/docs"),
            executable = True,
            cfg = "target",
        ),
    },
)
