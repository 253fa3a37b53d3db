"""The report of a sweep: what its jobs left behind, as one page that opens from disk and as tables for other programs.

`reading` makes records of the folders, `methods` tells apart what has one label, `table` and `comparing` set the
results beside each other, `exports`, `charts` and `page` show them, and `build.write_report` does all of it. Nothing
here needs torch, a backbone or a dataset.
"""
