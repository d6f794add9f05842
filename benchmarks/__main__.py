"""`make bench`: every comparison, one after the other."""

from benchmarks import views

views.main()
