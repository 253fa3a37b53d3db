"""The report of a sweep: the results of its jobs, as one page that opens from disk and as tables for other programs.

`reading` makes records of the folders, `methods` separates methods that share a label, `replicates` says what tells the
runs of a method apart, `table` and `comparing` compare the results, `exports`, `charts` and `page` show them, and
`build.write_report` does all of it. Nothing here needs torch, a backbone or a dataset.
"""
