//! Building blocks of reports: tables that can be written as JSON, CSV, HTML or Markdown, sections with a figure, and a
//! self-contained HTML page of sections.

use crate::error::{Error, Result};
use crate::report::files::publish;
use serde::Serialize;
use std::borrow::Cow;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// One cell of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Cell {
    /// A whole number.
    Count(u64),
    /// Text, which is escaped in HTML.
    Text(String),
    /// A number; `None` if the value is not defined.
    Number(Option<f64>),
}

impl From<usize> for Cell {
    fn from(n: usize) -> Self {
        Cell::Count(n as u64)
    }
}

impl From<u64> for Cell {
    fn from(n: u64) -> Self {
        Cell::Count(n)
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Cell::Text(text)
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Cell::Text(text.into())
    }
}

impl From<Option<f64>> for Cell {
    fn from(x: Option<f64>) -> Self {
        Cell::Number(x.filter(|x| x.is_finite()))
    }
}

impl From<f64> for Cell {
    fn from(x: f64) -> Self {
        Some(x).into()
    }
}

impl Cell {
    fn csv(&self) -> String {
        match self {
            Cell::Count(n) => n.to_string(),
            Cell::Number(x) => x.map_or(String::new(), |x| x.to_string()),
            Cell::Text(text) if text.contains(['"', ',', '\n', '\r']) => {
                format!("\"{}\"", text.replace('"', "\"\""))
            }
            Cell::Text(text) => text.clone(),
        }
    }

    /// Returns whether the cell is aligned to the left: text that is not a number.
    fn is_words(&self) -> bool {
        matches!(self, Cell::Text(text) if text.starts_with(char::is_alphabetic))
    }

    /// Returns the cell as text for readers: four digits after the decimal point, and a dash for `None`.
    fn shown(&self) -> String {
        match self {
            Cell::Number(x) => x.map_or("–".into(), |x| format!("{x:.4}")),
            Cell::Text(text) => text.clone(),
            Cell::Count(n) => n.to_string(),
        }
    }
}

/// A table with one observation per row.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    /// Names of the columns, in order.
    pub columns: Vec<Cow<'static, str>>,
    /// The rows, each with one cell per column.
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table without rows.
    pub fn new(columns: &[&'static str]) -> Self {
        Table {
            columns: columns.iter().map(|c| Cow::Borrowed(*c)).collect(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn csv(&self) -> String {
        let mut text = self.columns.join(",") + "\n";
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(Cell::csv).collect();
            text.push_str(&cells.join(","));
            text.push('\n');
        }
        text
    }

    /// Returns the table in Markdown, with its columns aligned for display in a terminal: text to the left, numbers to the
    /// right.
    pub fn markdown(&self) -> String {
        let shown: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| row.iter().map(|c| c.shown().replace('|', "\\|")).collect())
            .collect();
        let columns = 0..self.columns.len();
        let width = |i: usize| {
            let cells = shown.iter().map(|row| row[i].chars().count());
            cells
                .chain([self.columns[i].chars().count(), 4])
                .max()
                .unwrap_or(0)
        };
        let text = |i: usize| self.rows.iter().any(|row| matches!(row[i], Cell::Text(_)));
        let line = |cells: &[String]| {
            let padded = columns.clone().map(|i| match text(i) {
                true => format!(" {:<1$} |", cells[i], width(i)),
                false => format!(" {:>1$} |", cells[i], width(i)),
            });
            format!("|{}\n", padded.collect::<String>())
        };
        let names: Vec<String> = self.columns.iter().map(|c| c.to_string()).collect();
        let rule: Vec<String> = columns
            .clone()
            .map(|i| match text(i) {
                true => "-".repeat(width(i)),
                false => format!("{}:", "-".repeat(width(i) - 1)),
            })
            .collect();
        let rows = shown.iter().map(|row| line(row));
        [line(&names), line(&rule)]
            .into_iter()
            .chain(rows)
            .collect()
    }
}

/// One section of a report: its description, its numbers and its figure.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Section {
    /// File name of its CSV and SVG, without the ending.
    pub name: &'static str,
    /// Heading of the section.
    pub title: &'static str,
    /// Description of what the section shows.
    pub shows: &'static str,
    /// Formula of the values; empty if there is none.
    pub formula: &'static str,
    /// Notes about parts that do not apply, or that are specific to this report.
    pub notes: Vec<String>,
    /// The numbers, which are also written as CSV.
    pub table: Table,
    /// The figure as SVG.
    #[serde(skip)]
    pub figure: Option<String>,
}

/// Writes the sections' tables as CSV and their figures as SVG into `folder`, which must exist.
/// Sections without rows are left out.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_files(sections: &[Section], folder: &Path) -> Result<()> {
    for section in sections.iter().filter(|s| !s.table.rows.is_empty()) {
        let file = |ending: &str| folder.join(format!("{}.{ending}", section.name));
        publish(&file("csv"), section.table.csv())?;
        if let Some(figure) = &section.figure {
            publish(&file("svg"), figure)?;
        }
    }
    Ok(())
}

/// Creates the folder of a report.
///
/// # Errors
/// When the folder cannot be created.
pub fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))
}

/// A report on one page.
pub struct Page<'a> {
    /// Title of the browser window.
    pub title: String,
    /// Heading of the page.
    pub heading: String,
    /// Paragraphs below the heading.
    pub introduction: Vec<String>,
    /// The sections, in the order in which they are shown.
    pub sections: &'a [Section],
    /// Tables with at most this number of rows are shown expanded.
    pub open_rows: usize,
}

/// Replaces the text between two marks in a file.
///
/// # Errors
/// When the file cannot be read or written, or a mark is missing.
pub fn replace_between(page: &Path, [begin, end]: [&str; 2], text: &str) -> Result<()> {
    let whole = fs::read_to_string(page).map_err(|e| Error::io("read", page, e))?;
    let parts = whole
        .split_once(begin)
        .and_then(|(before, rest)| Some((before, rest.split_once(end)?.1)));
    let Some((before, after)) = parts else {
        let marks = format!("the lines \"{begin}\" and \"{end}\"");
        return Err(Error::file(
            page,
            marks,
            "a page without them",
            "add both lines where the table belongs",
        ));
    };
    publish(page, format!("{before}{begin}\n{text}{end}{after}"))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

const STYLE: &str = "\
body { font: 16px/1.5 sans-serif; color: #333; max-width: 72em; margin: 2em auto; padding: 0 1em }
svg { max-width: 100%; height: auto }
details { overflow-x: auto }
code { background: #f3f3f3; padding: 0 .3em }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .1em .8em; text-align: right; border-bottom: 1px solid #e6e6e6 }
td.words { text-align: left }
.note { color: #8a3b00 }";

/// Returns an HTML document of several pages, one below the other, that needs no other files. Its title is that of the
/// first page.
pub fn document(pages: &[Page]) -> String {
    let mut text = String::new();
    let title = pages.first().map_or("", |page| &page.title);
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{}</title>\n\
         <style>\n{STYLE}\n</style>\n",
        escaped(title),
    );
    for (i, page) in pages.iter().enumerate() {
        // Section names are repeated from page to page.
        let prefix = if i == 0 {
            String::new()
        } else {
            format!("{}-", i + 1)
        };
        page.body(&mut text, &prefix);
    }
    text.push_str("</html>\n");
    text
}

impl Page<'_> {
    /// Returns the page as HTML that needs no other files.
    pub fn html(&self) -> String {
        document(std::slice::from_ref(self))
    }

    fn body(&self, text: &mut String, prefix: &str) {
        let _ = writeln!(text, "<h1>{}</h1>", escaped(&self.heading));
        for paragraph in &self.introduction {
            let _ = writeln!(text, "<p>{}</p>", escaped(paragraph));
        }
        for (i, section) in self.sections.iter().enumerate() {
            self.section(text, prefix, i + 1, section);
        }
    }

    fn section(&self, page: &mut String, prefix: &str, number: usize, section: &Section) {
        let _ = write!(
            page,
            "<h2 id=\"{prefix}{}\">{number}. {}</h2>\n<p>{}</p>\n",
            section.name,
            escaped(section.title),
            escaped(section.shows),
        );
        if !section.formula.is_empty() {
            let _ = writeln!(page, "<p><code>{}</code></p>", escaped(section.formula));
        }
        for note in &section.notes {
            let _ = writeln!(page, "<p class=\"note\">{}</p>", escaped(note));
        }
        if let Some(figure) = &section.figure {
            let _ = writeln!(page, "<figure>{figure}</figure>");
        }
        let table = &section.table;
        if table.rows.is_empty() {
            return;
        }
        let open = if table.rows.len() <= self.open_rows {
            " open"
        } else {
            ""
        };
        let _ = write!(
            page,
            "<details{open}><summary>The numbers</summary>\n<table>\n<tr>"
        );
        for column in &table.columns {
            let _ = write!(page, "<th>{}</th>", escaped(column));
        }
        page.push_str("</tr>\n");
        for row in &table.rows {
            page.push_str("<tr>");
            for cell in row {
                let class = if cell.is_words() {
                    " class=\"words\""
                } else {
                    ""
                };
                let _ = write!(page, "<td{class}>{}</td>", escaped(&cell.shown()));
            }
            page.push_str("</tr>\n");
        }
        page.push_str("</table>\n</details>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_becomes_csv_with_quotes_only_where_needed() {
        let mut table = Table::new(&["source", "count", "share"]);
        table
            .rows
            .push(vec!["a, \"b\"".into(), 3usize.into(), 0.25.into()]);
        table
            .rows
            .push(vec!["c".into(), 0usize.into(), f64::NAN.into()]);
        assert_eq!(
            table.csv(),
            "source,count,share\n\"a, \"\"b\"\"\",3,0.25\nc,0,\n"
        );
    }

    #[test]
    fn a_table_becomes_markdown_with_numbers_to_the_right() {
        let mut table = Table::new(&["router", "loss"]);
        table.rows.push(vec!["topk".into(), 1.25.into()]);
        table.rows.push(vec!["a|b".into(), f64::NAN.into()]);
        assert_eq!(
            table.markdown(),
            "| router |   loss |\n| ------ | -----: |\n| topk   | 1.2500 |\n| a\\|b   |      – |\n"
        );
    }

    #[test]
    fn names_cannot_break_the_page() {
        assert_eq!(escaped("<b> & \"c\""), "&lt;b&gt; &amp; &quot;c&quot;");
    }
}
