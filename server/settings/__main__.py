"""Print the table of settings in Markdown: `python -m server.settings`."""

from server.settings.markdown import markdown_table

if __name__ == "__main__":
    print(markdown_table(), end="")
