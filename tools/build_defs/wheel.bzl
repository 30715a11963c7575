"""The rule behind `//:wheel`."""

def _wheel_impl(ctx):
    out = ctx.actions.declare_directory(ctx.label.name)
    runfiles = [dep[DefaultInfo].default_runfiles.files for dep in ctx.attr.deps]
    files = [
        file
        for file in depset(transitive = runfiles).to_list()
        if file.owner.workspace_name == ctx.label.workspace_name
    ]
    listing = ctx.actions.declare_file(ctx.label.name + ".files")
    ctx.actions.write(
        listing,
        "".join(["%s\t%s\n" % (file.short_path, file.path) for file in files]),
    )
    ctx.actions.run(
        executable = ctx.executable._archive,
        arguments = [out.path, listing.path],
        inputs = files + [listing] + ctx.files.about,
        outputs = [out],
        mnemonic = "Wheel",
        progress_message = "Writing %{output}",
    )
    return [DefaultInfo(files = depset([out]), runfiles = ctx.runfiles([out]))]

wheel = rule(
    doc = """A folder with a wheel of libraries, and of what they need of ours.

Its name says for which Python and which Linux it is, which only the extensions
tell.""",
    implementation = _wheel_impl,
    attrs = {
        "deps": attr.label_list(
            mandatory = True,
            doc = "Python libraries.",
        ),
        "about": attr.label_list(
            mandatory = True,
            allow_files = True,
            doc = "pyproject.toml, and the files that it names.",
        ),
        "_archive": attr.label(
            default = Label("//tools/wheel:archive"),
            executable = True,
            cfg = "exec",
        ),
    },
)
