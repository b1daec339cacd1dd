//! Man pages and completions, made of the command line's own definition. `blxctl` is built with this file as well.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

/// Writes `man/man1/*.1` and `completions/{bash,zsh,fish}/*` below `dir`, with the names they are installed under.
pub(crate) fn generate(mut command: Command, dir: &Path) -> io::Result<()> {
    let name = command.get_name().to_owned();
    // The completions build the command, with its 'help' subcommands; these have no page.
    let mut pages_of = command.clone().disable_help_subcommand(true);
    let shells = [
        (Shell::Bash, "bash", name.clone()),
        (Shell::Zsh, "zsh", format!("_{name}")),
        (Shell::Fish, "fish", format!("{name}.fish")),
    ];
    for (shell, place, file) in shells {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut command, &name, &mut text);
        let place = dir.join("completions").join(place);
        fs::create_dir_all(&place)?;
        fs::write(place.join(file), text)?;
    }
    let man = dir.join("man/man1");
    fs::create_dir_all(&man)?;
    pages_of.build();
    pages(&pages_of, None, &man)
}

/// The page of a command and those of its subcommands.
fn pages(command: &Command, parent: Option<&str>, dir: &Path) -> io::Result<()> {
    let name = page_name(command);
    fs::write(dir.join(format!("{name}.1")), page(command, parent)?)?;
    let mut subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set());
    subcommands.try_for_each(|sub| pages(sub, Some(&name), dir))
}

fn page_name(command: &Command) -> String {
    command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned()
}

fn page(command: &Command, parent: Option<&str>) -> io::Result<Vec<u8>> {
    let source = concat!("blxrep ", env!("CARGO_PKG_VERSION"));
    let title = page_name(command).to_uppercase();
    // No date, so that a page made again is the same. The quotes keep its place, or the source would take it.
    let man = Man::new(command.clone()).title(title).date("\"\"").source(source).manual("blxrep");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    let after = command.get_after_long_help().or_else(|| command.get_after_help());
    let after = after.map(ToString::to_string).unwrap_or_default();
    let (prose, sections) = split(&after);
    paragraphs(&prose).to_writer(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.get_subcommands().any(|sub| !sub.is_hide_set()) {
        man.render_subcommands_section(&mut page)?;
    }
    for (heading, lines) in sections {
        section(heading, &lines).to_writer(&mut page)?;
    }
    if let Some(parent) = parent {
        let mut roff = Roff::new();
        roff.control("SH", ["SEE ALSO"]).text([bold(parent), roman("(1)")]);
        roff.to_writer(&mut page)?;
    }
    page.flush()?;
    Ok(page)
}

/// Splits the text below a help into what stands before the first heading, and the lines under each. A heading is a line
/// such as `Examples:`.
fn split(text: &str) -> (Vec<&str>, Vec<(&str, Vec<&str>)>) {
    let (mut prose, mut sections) = (Vec::new(), Vec::<(&str, Vec<&str>)>::new());
    for line in text.lines() {
        match (line.strip_suffix(':').filter(|heading| !heading.starts_with(' ')), sections.last_mut()) {
            (Some(heading), _) => sections.push((heading, Vec::new())),
            (None, Some((_, lines))) => lines.push(line),
            (None, None) => prose.push(line),
        }
    }
    (prose, sections)
}

fn paragraphs(lines: &[&str]) -> Roff {
    let mut roff = Roff::new();
    for paragraph in lines.split(|line| line.is_empty()).filter(|lines| !lines.is_empty()) {
        roff.control("PP", []);
        paragraph.iter().for_each(|line| {
            roff.text([roman(*line)]);
        });
    }
    roff
}

fn section(heading: &str, lines: &[&str]) -> Roff {
    let lines: Vec<_> = lines.iter().copied().filter(|line| !line.is_empty()).collect();
    let mut roff = Roff::new();
    match heading {
        "Example" | "Examples" => {
            roff.control("SH", ["EXAMPLES"]);
            examples(&mut roff, &lines);
        }
        _ => {
            let title =
                if heading == "Exit codes" { "EXIT STATUS".to_owned() } else { heading.to_uppercase() };
            roff.control("SH", [title.as_str()]);
            terms(&mut roff, &lines);
        }
    }
    roff
}

/// Indented lines as they are, the others as text.
fn examples(roff: &mut Roff, lines: &[&str]) {
    for block in lines.chunk_by(|a, b| a.starts_with(' ') == b.starts_with(' ')) {
        let literal = block.iter().all(|line| line.starts_with(' '));
        roff.control(if literal { "nf" } else { "PP" }, []);
        for line in block {
            roff.text([roman(line.trim())]);
        }
        if literal {
            roff.control("fi", []);
        }
    }
}

/// A term, two spaces and what it means; lines that are indented further go on.
fn terms(roff: &mut Roff, lines: &[&str]) {
    for line in lines {
        let item = line.strip_prefix("  ").filter(|rest| !rest.starts_with(' '));
        match item.map(|rest| rest.split_once("  ").unwrap_or((rest, ""))) {
            Some((term, text)) => {
                roff.control("TP", []).text([bold(term)]);
                // An empty line would be one on the page.
                if !text.is_empty() {
                    roff.text([roman(text.trim())]);
                }
            }
            None => {
                roff.text([roman(line.trim())]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_below_a_help_becomes_sections() {
        let text = "What it is.\n\nMore: of it.\n\nExamples:\n  a b   c\nthen\n  d\n\nExit codes:\n  0  fine\n     and well\n  long\n     term";
        let (prose, sections) = split(text);
        assert_eq!(prose, ["What it is.", "", "More: of it.", ""]);
        let headings: Vec<_> = sections.iter().map(|(heading, _)| *heading).collect();
        assert_eq!(headings, ["Examples", "Exit codes"]);
        let examples = section("Examples", &sections[0].1).render();
        assert!(examples.contains(".SH EXAMPLES\n.nf\na b   c\n.fi\n.PP\nthen\n.nf\nd\n.fi\n"), "{examples}");
        let codes = section("Exit codes", &sections[1].1).render();
        assert!(
            codes.contains(".SH \"EXIT STATUS\"\n.TP\n\\fB0\\fR\nfine\nand well\n.TP\n\\fBlong\\fR\nterm"),
            "{codes}"
        );
    }

    #[test]
    fn every_command_has_its_page_and_every_shell_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let command = Command::new("prog")
            .version("1")
            .about("Does it")
            .subcommand(Command::new("sub").about("A part").subcommand(Command::new("deep").about("Deeper")))
            .subcommand(Command::new("secret").hide(true));
        generate(command, dir.path()).unwrap();
        let mut found: Vec<_> =
            fs::read_dir(dir.path().join("man/man1")).unwrap().map(|e| e.unwrap().file_name()).collect();
        found.sort();
        assert_eq!(found, ["prog-sub-deep.1", "prog-sub.1", "prog.1"]);
        let page = fs::read_to_string(dir.path().join("man/man1/prog-sub.1")).unwrap();
        assert!(page.contains(".TH PROG-SUB 1 \"\" \"blxrep "), "{page}");
        assert!(page.contains(".SH NAME\nprog\\-sub \\- A part"), "{page}");
        for file in ["bash/prog", "zsh/_prog", "fish/prog.fish"] {
            assert!(dir.path().join("completions").join(file).metadata().unwrap().len() > 0, "{file}");
        }
    }
}
