"""Vendor libraries without their hardware: signatures, spies, and emulations that adapters run against on the CPU.

What there is:

* :mod:`emulated.signatures` reads ``platforms/*/signatures/*.json``, which ``tools/snapshot_signatures.py`` makes out
  of the real distributions: every version's parameters, in order, with defaults.
* :mod:`emulated.library` puts a library into ``sys.modules`` whose functions have exactly those parameters. Each call
  is bound to them, so that a renamed, missing or reordered parameter fails, and is recorded; then the emulation
  answers.
* :mod:`emulated.operators` does the same for torch's own operators, through torch's dispatcher.
* :mod:`emulated.hardware` makes devices of any NVIDIA arch whose tensors live on the CPU, and runs
  ``hal.testing.check`` on them: the whole adapter path by value, for every arch.
* :mod:`emulated.attend` is the float32 formula that emulations share.
* One module a library (:mod:`emulated.flash_attn_2`, ...) has that library's habits over the formula: layouts, LSE base
  and shape, window sentinels, values of empty rows, sizes that are checked exactly, what is refused.

To add a library: list its functions in ``sources.toml``, run the tool, write ``emulated/<library>.py`` with functions
of the same parameters, and in a test::

    adapters = ["hal_nvidia._flash_attn_2"]
    with emulated.library.installed("flash-attn", "2.8.3", flash_attn_2.FUNCTIONS, adapters=adapters) as lib:
        result = emulated.hardware.check(kernel, request, arch="sm_80")
        assert result.ok, result.detail
        lib.calls[-1].arguments["block_table"]

An emulation is held against the real function where the hardware is: ``tests/gpu/test_nvidia_emulations.py`` and
``tests/gpu/test_nvidia_flashinfer_emulations.py``.
"""
