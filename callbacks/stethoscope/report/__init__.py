"""A run, or two of them, as one page to read."""

from stethoscope.report._causes import Cause as Cause
from stethoscope.report._causes import causes as causes
from stethoscope.report._compare import Comparison as Comparison
from stethoscope.report._compare import compare as compare
from stethoscope.report._difference import compared_html as compared_html
from stethoscope.report._difference import compared_json as compared_json
from stethoscope.report._difference import compared_markdown as compared_markdown
from stethoscope.report._html import to_html as to_html
from stethoscope.report._summary import Summary as Summary
from stethoscope.report._summary import summarise as summarise
from stethoscope.report._text import to_json as to_json
from stethoscope.report._text import to_markdown as to_markdown
