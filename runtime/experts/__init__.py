"""The expert pager: everything that the paper is about, behind `pager.ExpertPager`."""
