//! Which checkpoint a person means. Pure.

use crate::ids::CheckpointId;

/// A text that names no checkpoint there is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// The text is not of a form that can name one.
    #[error(
        "{0:?} names no checkpoint: YYYYMMDDHHMMSS (with -N where a second holds several), YYYYMMDDHHMM or latest does"
    )]
    Form(String),
    /// There is no such checkpoint.
    #[error("there is no checkpoint {text}{}", nearest(*.before, *.after))]
    None {
        /// What was asked for.
        text: String,
        /// The newest one before it.
        before: Option<CheckpointId>,
        /// The oldest one after it.
        after: Option<CheckpointId>,
    },
}

fn nearest(before: Option<CheckpointId>, after: Option<CheckpointId>) -> String {
    match (before, after) {
        (Some(b), Some(a)) => format!("; the nearest are {b} before and {a} after"),
        (Some(b), None) => format!("; the nearest is {b} before"),
        (None, Some(a)) => format!("; the nearest is {a} after"),
        (None, None) => "; there is none at all".into(),
    }
}

/// A minute as a person writes it, `YYYYMMDDHHMM`.
pub fn parse_minute(text: &str) -> Option<u64> {
    let whole = text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
    whole.then(|| format!("{text}00").parse::<CheckpointId>().ok())?.map(CheckpointId::minute)
}

/// The checkpoint of `ids` (in any order) that `text` means: an id, `YYYYMMDDHHMM` for the newest of that minute, or
/// `latest`.
///
/// # Errors
/// When the text is of no such form, or there is no such checkpoint.
pub fn select(ids: &[CheckpointId], text: &str) -> Result<CheckpointId, SelectError> {
    let none =
        |before: Option<CheckpointId>, after| SelectError::None { text: text.to_owned(), before, after };
    if text == "latest" {
        return ids.iter().max().copied().ok_or_else(|| none(None, None));
    }
    if let Some(minute) = parse_minute(text) {
        let before = ids.iter().filter(|id| id.minute() < minute).max().copied();
        let after = ids.iter().filter(|id| id.minute() > minute).min().copied();
        let found = ids.iter().filter(|id| id.minute() == minute).max().copied();
        return found.ok_or_else(|| none(before, after));
    }
    let id: CheckpointId = text.parse().map_err(|_| SelectError::Form(text.chars().take(80).collect()))?;
    let before = ids.iter().filter(|i| **i < id).max().copied();
    let after = ids.iter().filter(|i| **i > id).min().copied();
    ids.contains(&id).then_some(id).ok_or_else(|| none(before, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> Vec<CheckpointId> {
        ["20261121203456", "20261121203456-2", "20261121203459", "20261121210000"]
            .map(|t| t.parse().unwrap())
            .to_vec()
    }

    #[test]
    fn an_id_a_minute_and_latest_name_a_checkpoint() {
        let name = |text| select(&ids(), text).map(|id| id.to_string());
        assert_eq!(name("20261121203456").unwrap(), "20261121203456");
        assert_eq!(name("20261121203456-2").unwrap(), "20261121203456-2");
        assert_eq!(name("202611212034").unwrap(), "20261121203459");
        assert_eq!(name("latest").unwrap(), "20261121210000");
    }

    #[test]
    fn what_is_not_there_names_its_neighbours() {
        let text = |t| select(&ids(), t).unwrap_err().to_string();
        let said = text("202611212035");
        assert!(said.contains("20261121203459 before") && said.contains("20261121210000 after"), "{said}");
        assert!(text("20261121203457").contains("20261121203456-2 before"));
        assert!(text("202011212035").contains("20261121203456 after"));
        assert!(select(&[], "latest").unwrap_err().to_string().contains("none at all"));
        for bad in ["", "newest", "2026", "202613212034", "20261121203456-1", "２０２６11212034"] {
            assert!(matches!(select(&ids(), bad), Err(SelectError::Form(_))), "{bad}");
        }
    }
}
