"""The HTML report: one recording on one timeline, as one file that needs no network.

``lanes`` and its neighbours compute what each lane shows, as plain arrays; ``page`` puts them into the page; the
files in ``assets`` draw them in the browser.
"""
