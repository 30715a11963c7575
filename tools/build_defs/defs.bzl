"""The one file that BUILD files load rules from.

Labels are resolved where this file lives, so that the macros mean the same in a
workspace that depends on this one.
"""

load("@rules_cc//cc:defs.bzl", _cc_binary = "cc_binary", _cc_library = "cc_library", _cc_test = "cc_test")
load("@rules_python//python:defs.bzl", _py_binary = "py_binary", _py_library = "py_library", _py_test = "py_test")
load("//tools/build_defs:cuda.bzl", "cuda_objects")
load(":byte_code.bzl", "py_byte_code")
load(":site.bzl", _site = "site")
load(":wheel.bzl", _wheel = "wheel")

# Headers of others come in through `includes`, which makes them system headers,
# and so these hold for our own sources only.
_COPTS = [
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Werror",
    # Handlers reach Python as capsules: no symbol need be seen from outside, and
    # calls that nobody can interpose are cheaper.
    "-fvisibility=hidden",
]

# What each platform's tests need on top of @pypi.  The packages of accelerators
# are large: without --config=gpu or tpu nothing even names them.
_PLATFORM_DEPS = {
    "cpu": [],
    "gpu": select({
        Label("//tools/build_defs:gpu"): [Label("@pypi_gpu//:packages")],
        "//conditions:default": [],
    }),
    "tpu": select({
        Label("//tools/build_defs:tpu"): [Label("@pypi_tpu//:packages")],
        "//conditions:default": [],
    }),
}

py_binary = _py_binary
py_library = _py_library
site = _site
wheel = _wheel

def cc_library(name, copts = [], **kwargs):
    """A C++17 library, warnings being errors."""
    _cc_library(
        name = name,
        copts = _COPTS + copts,
        linkstatic = True,  # nothing links the shared one that would be made too
        **kwargs
    )

def cc_binary(name, copts = [], **kwargs):
    """A C++17 program, warnings being errors."""
    _cc_binary(name = name, copts = _COPTS + copts, **kwargs)

def cc_test(name, size, copts = [], **kwargs):
    """A C++17 test program, warnings being errors; it fails by exiting non-zero."""
    _cc_test(
        name = name,
        size = size,
        copts = _COPTS + copts,
        linkstatic = True,  # hidden symbols are not seen across libraries
        **kwargs
    )

def py_test(name, size, **kwargs):
    """A Python test that is its own main program (absltest)."""
    _py_test(name = name, size = size, **kwargs)

def nnx_py_library(name, srcs = [], pyi = None, data = [], testonly = None, tags = [], **kwargs):
    """A Python library with its byte code, and an extension's type stub.

    Args:
      name: the stem of the module's file.
      srcs: its sources.
      pyi: an optional stub that travels with it.
      data: what it reads at run time.
      testonly: whether only tests may use it.
      tags: of the library and its byte code.
      **kwargs: passed on to py_library.
    """
    byte_code = []
    if srcs:
        byte_code = [":%s.byte_code" % name]
        py_byte_code(
            name = name + ".byte_code",
            srcs = srcs,
            tags = tags,
            testonly = testonly,
            visibility = ["//visibility:private"],
        )
    _py_library(
        name = name,
        srcs = srcs,
        data = data + byte_code + ([pyi] if pyi else []),
        tags = tags,
        testonly = testonly,
        **kwargs
    )

def nnx_pybind_extension(
        name,
        srcs,
        deps = [],
        pyi = None,
        copts = [],
        linkopts = [],
        data = [],
        testonly = False,
        visibility = None,
        tags = [],
        **kwargs):
    """A pybind11 extension module.

    Makes `<name>.so`, and a py_library `<name>` that carries it, so that users
    name it in `deps` like any other module.

    Args:
      name: the module's name, as in `PYBIND11_MODULE(name, m)`.
      srcs: C++ sources.
      deps: C++ libraries; pybind11 and Python's headers are added.
      pyi: an optional stub that travels with it.
      copts: further compiler options.
      linkopts: further linker options.
      data: what it reads at run time.
      testonly: whether only tests may use it.
      visibility: of the py_library.
      tags: of both.
      **kwargs: passed on to the shared object (cc_binary).
    """
    _cc_binary(
        name = name + ".so",
        srcs = srcs,
        copts = _COPTS + copts,
        linkopts = linkopts,
        linkshared = True,
        tags = tags,
        testonly = testonly,
        visibility = ["//visibility:private"],
        deps = deps + [Label("//tools/build_defs:extension_headers")],
        **kwargs
    )
    nnx_py_library(
        name = name,
        data = data + [":%s.so" % name],
        pyi = pyi,
        tags = tags,
        testonly = testonly,
        visibility = visibility,
    )

def cuda_extension(name, kernels, srcs, deps = [], pyi = None, visibility = None):
    """A pybind11 extension module with CUDA kernels.

    Under --config=gpu it is what nnx_pybind_extension makes; without, a
    py_library of the same name that carries the stub alone, so that importing
    the module fails, and nothing of CUDA is fetched or built.

    Args:
      name: the module's name, as in `PYBIND11_MODULE(name, m)`.
      kernels: `.cu.cc` files, compiled by nvcc; they include neither XLA nor
        Python.
      srcs: `.cc` files that bind them, compiled by the host's compiler.
      deps: C++ libraries of both.
      pyi: an optional stub that travels with it.
      visibility: of the py_library.
    """
    only_gpu = {
        # Not among `//...`, and only analysed where it can be built.
        "tags": ["gpu", "manual"],
        "target_compatible_with": select({
            Label("//tools/build_defs:gpu"): [],
            "//conditions:default": ["@platforms//:incompatible"],
        }),
        "visibility": ["//visibility:private"],
    }
    cuda_objects(
        name = name + "_kernels",
        srcs = kernels,
        deps = deps,
        **only_gpu
    )
    _cc_binary(
        name = name + ".so",
        srcs = srcs + [":%s_kernels" % name],
        copts = _COPTS,
        linkshared = True,
        deps = deps + [
            Label("//tools/build_defs:extension_headers"),
            Label("@nnx_cuda//:runtime"),
        ],
        **only_gpu
    )
    nnx_py_library(
        name = name,
        data = select({
            Label("//tools/build_defs:gpu"): [":%s.so" % name],
            "//conditions:default": [],
        }),
        pyi = pyi,
        visibility = visibility,
    )

def _quick_by_default():
    """Whether the package is one of this workspace's own.

    A workspace that depends on this one may compute more in its tests.
    """
    return native.repository_name().lstrip("@") == Label("//:BUILD").workspace_name

def _run_by(main, name, args, quick_xla, srcs = [], deps = [], env = {}, **kwargs):
    """A py_test whose main program is one of this directory."""
    main = Label("//tools/build_defs:" + main)
    if quick_xla == None:
        quick_xla = _quick_by_default()
    _py_test(
        name = name,
        srcs = srcs + [main],
        main = main,
        args = args,
        env = {"PYTHONWARNINGS": "error"} | ({"QUICK_XLA": "1"} if quick_xla else {}) | env,
        deps = deps + [
            Label("//tools/build_defs:alone"),
            Label("//tools/build_defs:quick_xla"),
        ],
        **kwargs
    )

def nnx_py_test(name, srcs, size, deps = [], args = [], quick_xla = None, **kwargs):
    """Runs test files under pytest, warnings being errors.

    `unittest` and `absltest` classes are collected as well; no main program is
    needed.  `shard_count` and `--test_filter` work on single test cases.

    Args:
      name: the test file's stem.
      srcs: the test files.
      size: required: small, medium, large or enormous.
      deps: what they import; pytest is added.
      args: further arguments for pytest.
      quick_xla: whether XLA compiles for the CPU quickly rather than well; by
        default so in this workspace alone. Not for a test that is about programs'
        numbers as users get them, or that computes for longer than it compiles;
        one that looks for copies compiles by `hlo.compiled`.
      **kwargs: passed on to py_test.
    """
    _run_by(
        main = "pytest_main.py",
        name = name,
        srcs = srcs,
        args = ["$(rootpath %s)" % src for src in srcs] + args,
        quick_xla = quick_xla,
        size = size,
        deps = deps + [Label("//tools/build_defs:pytest_runner")],
        **kwargs
    )

def doctest_test(name, modules, size, deps = [], quick_xla = None, **kwargs):
    """Runs the examples in the docstrings of modules; none at all is a failure.

    Args:
      name: of the test.
      modules: dotted names, compiled extensions included.
      size: required: small, medium, large or enormous.
      deps: the libraries that hold them.
      quick_xla: as in nnx_py_test.
      **kwargs: passed on to py_test.
    """
    _run_by(
        main = "doctest_main.py",
        name = name,
        args = modules,
        quick_xla = quick_xla,
        size = size,
        deps = deps,
        **kwargs
    )

def op_test(
        name,
        srcs,
        size,
        deps = [],
        env = {},
        tags = [],
        platforms = None,
        cpu_tag = "cpu",
        **kwargs):
    """One test file for each platform: `<name>_cpu`, `<name>_gpu`, `<name>_tpu`.

    Each carries its platform as a tag and in TEST_PLATFORM.  Without the device
    the tests of the latter two are skipped in words, or fail under
    --test_env=REQUIRE_DEVICE=1; `@pytest.mark.deviceless` exempts those that
    only compile for it.

    The first op_test of a package also makes its test suites `cpu`, `gpu` and
    `tpu`, which the suites of those names in //:BUILD gather.

    Args:
      name: the test file's stem.
      srcs: the test files.
      size: required: small, medium, large or enormous.
      deps: what they import; the packages of the accelerator are added.
      env: further environment.
      tags: further tags.
      platforms: some of cpu, gpu and tpu; all, if None.
      cpu_tag: of the test for the CPU, in place of its platform: `emulated` or
        `interpreted` where the CPU stands for a GPU or a TPU, with which it
        is then tested.
      **kwargs: passed on to nnx_py_test.
    """
    for platform, platform_deps in _PLATFORM_DEPS.items():
        if platforms != None and platform not in platforms:
            continue
        nnx_py_test(
            name = "%s_%s" % (name, platform),
            srcs = srcs,
            size = size,
            env = {"TEST_PLATFORM": platform} | env,
            # The others' flags are for their own compilers.
            quick_xla = None if platform == "cpu" else False,
            tags = [cpu_tag if platform == "cpu" else platform] + tags,
            deps = deps + platform_deps,
            **kwargs
        )
        if not native.existing_rule(platform):
            native.test_suite(
                name = platform,
                tags = [platform],
                visibility = [Label("//:__pkg__")],
            )
