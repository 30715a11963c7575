"""Build settings of this workspace."""

def _string_flag_impl(ctx):
    value = ctx.build_setting_value
    if value not in ctx.attr.values:
        fail("`--%s` must be one of %s, but got `%s`" % (ctx.label, ctx.attr.values, value))
    return []

string_flag = rule(
    doc = "A setting on the command line that takes one of a few words.",
    implementation = _string_flag_impl,
    attrs = {"values": attr.string_list(mandatory = True)},
    build_setting = config.string(flag = True),
)
