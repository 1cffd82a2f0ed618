"""Schedulers (methods/pmpd.md): when the precision of a text falls. One file each, behind `engine.schedule.Scheduler`."""
