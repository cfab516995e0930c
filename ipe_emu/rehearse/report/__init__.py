"""The report of a boot: ``summarise`` makes values of its events, ``text``, ``as_json`` and ``html`` give those a form.

Pure: nothing here reads or writes anything.
"""

from ipe_emu.rehearse.report.summary import Summary, summarise

__all__ = ["Summary", "summarise"]
