"""Unknown flags, arguments and commands: the nearest one, or another way, is suggested.

tests/server/cli/test_main.py has the other usage errors.
"""

import pytest

from server.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--prot", "1"], "unknown flag --prot (did you mean --port?) (see lightwell serve --help)"),
        (["serve", "--max_num_seqs=2"], "unknown flag --max_num_seqs (did you mean --max-num-seqs?)"),
        (["serve", "--enable-prefix-cache"], "unknown flag --enable-prefix-cache (did you mean --enable-prefix-cach"),
        (["serve", "--frobnicate"], "unknown flag --frobnicate (see lightwell serve --help)"),
        (["chat", "--modle", "x"], "unknown flag --modle (did you mean --model?) (see lightwell chat --help)"),
        (["bench", "--concurency", "3"], "unknown flag --concurency (did you mean --concurrency?)"),
        (["list", "--jsno"], "unknown flag --jsno (did you mean --json?)"),
        (["serv"], "argument COMMAND: invalid choice: 'serv' (did you mean serve?) (see lightwell --help)"),
        (["frobnicate"], "argument COMMAND: invalid choice: 'frobnicate' (choose from run, serve, chat, "),
        (["run", "smollm2-135m", "hello"], "unexpected argument 'hello': a question can be piped in"),
        (["chat", "llama"], "unexpected argument 'llama': --model is the name of the model"),
        (["--verison"], "unknown flag --verison (did you mean --version?) (see lightwell --help)"),
    ],
)
def test_what_was_meant_is_suggested(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lightwell: error: {message}")
    assert error.count("\n") == 1
