//! How a job ended, and what is said about it. Pure.

use blxrep_dbus::problem::{Problem, ProblemKind};
use blxrep_dbus::words::{JobResult, JobType};
use serde_json::{Map, Value, json};

use crate::failure::{Exit, Failure};
use crate::model::{Named, Verified, number, text, texts};
use crate::render;

/// What `JobRemoved` told.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) id: u32,
    pub(crate) job_type: JobType,
    pub(crate) agent: String,
    /// See [`JobResult`].
    pub(crate) result: String,
    pub(crate) details: Named,
}

impl Ended {
    fn is_done(&self) -> bool {
        self.result == JobResult::Done.as_str()
    }

    fn damage(&self) -> Vec<String> {
        texts(&self.details, "damage")
    }

    /// The checkpoints that a sync took, by disk.
    fn checkpoints(&self) -> Vec<(String, String)> {
        let Some(value) = self.details.get("checkpoints") else { return Vec::new() };
        let read = value.try_clone().and_then(std::collections::BTreeMap::<String, String>::try_from);
        let clean = |text: &String| crate::model::clean(text);
        read.unwrap_or_default().iter().map(|(disk, id)| (clean(disk), clean(id))).collect()
    }

    /// What a verify found, by disk.
    fn verified(&self) -> Vec<Verified> {
        let Some(value) = self.details.get("verified") else { return Vec::new() };
        let rows = value.try_clone().and_then(Vec::<Named>::try_from).unwrap_or_default();
        rows.iter().map(Verified::new).collect()
    }

    /// For standard output; empty if it did not do what it was asked for.
    pub(crate) fn text(&self) -> String {
        if !self.is_done() {
            return String::new();
        }
        let get = |key| text(&self.details, key);
        let of = |disk: &str| {
            if self.agent.is_empty() { disk.to_owned() } else { format!("{}'s {disk}", self.agent) }
        };
        match self.job_type {
            JobType::Restore => format!(
                "{}: checkpoint {} of {} ({}), {} verified\n",
                get("output"),
                get("checkpoint"),
                of(&get("disk")),
                get("consistency"),
                render::bytes(number(&self.details, "size_bytes"))
            ),
            JobType::Sync => {
                let line = |(disk, id): &(String, String)| format!("checkpoint {id} of {}\n", of(disk));
                self.checkpoints().iter().map(line).collect()
            }
            JobType::Verify if !self.details.contains_key("checkpoint") => render::verified(&self.verified()),
            JobType::Verify if self.damage().is_empty() => {
                format!("checkpoint {} of {}: sound\n", get("checkpoint"), of(&get("disk")))
            }
            JobType::Verify | JobType::Mount | JobType::Export => String::new(),
        }
    }

    /// For standard error: what a person should know of something that is done.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.is_done() && text(&self.details, "consistency") == "fuzzy" {
            lines.push(
                "warning: this checkpoint is fuzzy: blocks are from slightly different moments; check its file systems"
                    .to_owned(),
            );
        }
        let blocks = number(&self.details, "unreadable_blocks");
        if self.is_done() && blocks > 0 {
            let sectors = text(&self.details, "unreadable_sectors");
            let sectors = if sectors.is_empty() {
                "'verify' names them".to_owned()
            } else {
                format!("sectors {sectors}")
            };
            lines.push(format!(
                "warning: {blocks} blocks could not be read on the agent's disk and are zeros here: {sectors}"
            ));
        }
        let note = text(&self.details, "note");
        if !note.is_empty() {
            lines.push(format!("note: {note}"));
        }
        lines
    }

    /// Why it is no success; `None` if it is one.
    pub(crate) fn failure(&self, action: &str) -> Option<Failure> {
        let damage = self.damage();
        let mut failure = match self.result.parse() {
            Ok(JobResult::Done) if damage.is_empty() => return None,
            Ok(JobResult::Done) if !self.details.contains_key("checkpoint") => {
                let damaged: u64 = self.verified().iter().map(|row| row.damaged).sum();
                Failure::new(Exit::Damaged, format!("checkpoints are damaged: {damaged}"))
            }
            Ok(JobResult::Done) => {
                let checkpoint = text(&self.details, "checkpoint");
                let disk = text(&self.details, "disk");
                Failure::new(Exit::Damaged, format!("checkpoint {checkpoint} of {disk} is damaged"))
            }
            Ok(JobResult::Canceled) => Failure::failed(format!("job {} was canceled", self.id)),
            Ok(JobResult::Failed) => {
                let kind =
                    ProblemKind::from_name(&text(&self.details, "error")).unwrap_or(ProblemKind::Failed);
                Failure::of_problem(&Problem::new(kind, text(&self.details, "message")), action)
            }
            Err(_) => Failure::failed(format!("job {} ended as '{}'", self.id, self.result)),
        };
        for line in damage {
            failure.message.push_str(&format!("\n  {line}"));
        }
        Some(failure)
    }

    pub(crate) fn json(&self) -> Value {
        let mut object = Map::new();
        object.insert("job".into(), self.id.into());
        object.insert("type".into(), self.job_type.as_str().into());
        object.insert("result".into(), self.result.clone().into());
        for key in
            ["checkpoint", "disk", "consistency", "note", "output", "unreadable_sectors", "error", "message"]
        {
            if self.details.contains_key(key) {
                object.insert(key.into(), text(&self.details, key).into());
            }
        }
        for key in ["size_bytes", "written_bytes", "unreadable_blocks"] {
            if self.details.contains_key(key) {
                object.insert(key.into(), number(&self.details, key).into());
            }
        }
        if self.details.contains_key("damage") {
            object.insert("damage".into(), self.damage().into());
        }
        if self.details.contains_key("verified") {
            let rows: Vec<_> = self.verified().iter().map(Verified::json).collect();
            object.insert("verified".into(), rows.into());
        }
        if self.details.contains_key("checkpoints") {
            let checkpoints: Map<_, _> =
                self.checkpoints().into_iter().map(|(disk, id)| (disk, Value::from(id))).collect();
            object.insert("checkpoints".into(), json!(checkpoints));
        }
        Value::Object(object)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use blxrep_dbus::ACTION_RESTORE;
    use insta::assert_snapshot;
    use zbus::wire::{OwnedVariant, Variant};

    use super::*;

    fn ended(job_type: JobType, result: &str, details: Vec<(&str, Variant<'_>)>) -> Ended {
        let details =
            details.into_iter().map(|(k, v)| (k.to_owned(), OwnedVariant::try_from(v).unwrap())).collect();
        Ended { id: 7, job_type, agent: "web1".into(), result: result.into(), details }
    }

    fn restored(consistency: &'static str, note: &'static str) -> Ended {
        let details = vec![
            ("checkpoint", "20261121203456".into()),
            ("disk", "sda".into()),
            ("consistency", consistency.into()),
            ("note", note.into()),
            ("output", "/srv/x.img".into()),
            ("size_bytes", (1u64 << 30).into()),
            ("written_bytes", (1u64 << 29).into()),
        ];
        ended(JobType::Restore, "done", details)
    }

    #[test]
    fn a_restore_that_is_done() {
        let ended = restored("filesystem", "");
        assert_snapshot!(ended.text(), @"/srv/x.img: checkpoint 20261121203456 of web1's sda (filesystem), 1.00 GiB verified");
        assert_eq!((ended.warnings(), ended.failure("")), (Vec::new(), None));
        assert_snapshot!(format!("{:#}", ended.json()), @r#"
        {
          "checkpoint": "20261121203456",
          "consistency": "filesystem",
          "disk": "sda",
          "job": 7,
          "note": "",
          "output": "/srv/x.img",
          "result": "done",
          "size_bytes": 1073741824,
          "type": "restore",
          "written_bytes": 536870912
        }
        "#);
    }

    #[test]
    fn a_fuzzy_checkpoint_and_its_note_are_told() {
        assert_snapshot!(restored("fuzzy", "/srv could not be frozen").warnings().join("\n"), @r"
        warning: this checkpoint is fuzzy: blocks are from slightly different moments; check its file systems
        note: /srv could not be frozen
        ");
    }

    #[test]
    fn blocks_that_could_not_be_read_are_told_and_are_no_failure() {
        let mut ended = restored("filesystem", "");
        ended.details.insert("unreadable_blocks".into(), OwnedVariant::from(9u32));
        let sectors = OwnedVariant::try_from(Variant::from("2048-2055, 4096")).unwrap();
        ended.details.insert("unreadable_sectors".into(), sectors);
        assert_snapshot!(ended.warnings().join("\n"), @"warning: 9 blocks could not be read on the agent's disk and are zeros here: sectors 2048-2055, 4096");
        assert_eq!(ended.failure(""), None);
        assert_eq!(ended.json()["unreadable_blocks"], 9);
        assert_eq!(ended.json()["unreadable_sectors"], "2048-2055, 4096");
        ended.details.remove("unreadable_sectors");
        assert_snapshot!(ended.warnings().join("\n"), @"warning: 9 blocks could not be read on the agent's disk and are zeros here: 'verify' names them");
    }

    #[test]
    fn a_sync_names_each_checkpoint() {
        let checkpoints = HashMap::from([("sda", "20261121203456"), ("sdb", "20261121203458")]);
        let ended = ended(JobType::Sync, "done", vec![("checkpoints", checkpoints.into())]);
        assert_snapshot!(ended.text(), @r"
        checkpoint 20261121203456 of web1's sda
        checkpoint 20261121203458 of web1's sdb
        ");
        assert_snapshot!(ended.json(), @r#"{"checkpoints":{"sda":"20261121203456","sdb":"20261121203458"},"job":7,"result":"done","type":"sync"}"#);
    }

    #[test]
    fn a_verify_finds_damage_or_none() {
        let verified = |damage: Vec<&'static str>| {
            let details = vec![
                ("checkpoint", "20261121203456".into()),
                ("disk", "sda".into()),
                ("damage", damage.into()),
            ];
            ended(JobType::Verify, "done", details)
        };
        assert_snapshot!(verified(vec![]).text(), @"checkpoint 20261121203456 of web1's sda: sound");
        assert_eq!(verified(vec![]).failure(""), None);
        let damaged = verified(vec!["block 7 of x.bak", "block 9 of x.bak"]);
        assert_eq!(damaged.text(), "");
        let failure = damaged.failure("").unwrap();
        assert_eq!(failure.exit, Exit::Damaged);
        assert_snapshot!(failure, @r"
        checkpoint 20261121203456 of sda is damaged
          block 7 of x.bak
          block 9 of x.bak
        ");
    }

    #[test]
    fn a_verify_of_several_has_a_line_for_each_disk() {
        let row = |disk: &'static str, damaged: u32, first_damaged: &'static str| {
            HashMap::from([
                ("agent", Variant::from("web1")),
                ("disk", disk.into()),
                ("oldest", "20261121203456".into()),
                ("newest", "20261121213456".into()),
                ("checkpoints", 12u32.into()),
                ("damaged", damaged.into()),
                ("first_damaged", first_damaged.into()),
                ("unreadable", 0u32.into()),
            ])
        };
        let verified = |rows: Vec<HashMap<&'static str, Variant<'static>>>, damage: Vec<&'static str>| {
            ended(JobType::Verify, "done", vec![("verified", rows.into()), ("damage", damage.into())])
        };
        let sound = verified(vec![row("sda", 0, ""), row("sdb", 0, "")], vec![]);
        assert_eq!(sound.failure(""), None);
        assert_snapshot!(sound.text(), @r"
        AGENT  DISK  CHECKPOINTS  OLDEST          NEWEST          DAMAGED
        web1   sda            12  20261121203456  20261121213456  none
        web1   sdb            12  20261121203456  20261121213456  none
        ");
        let damaged =
            verified(vec![row("sda", 0, ""), row("sdb", 3, "20261121211956")], vec!["block 7 of x.bak"]);
        assert_snapshot!(damaged.text(), @r"
        AGENT  DISK  CHECKPOINTS  OLDEST          NEWEST          DAMAGED
        web1   sda            12  20261121203456  20261121213456  none
        web1   sdb            12  20261121203456  20261121213456  3, from 20261121211956 on
        ");
        let failure = damaged.failure("").unwrap();
        assert_eq!(failure.exit, Exit::Damaged);
        assert_snapshot!(failure, @r"
        checkpoints are damaged: 3
          block 7 of x.bak
        ");
        assert_eq!(damaged.json()["verified"][1]["first_damaged"], "20261121211956");
        assert_eq!(damaged.json()["verified"][0]["first_damaged"], Value::Null);
    }

    #[test]
    fn a_job_that_failed_says_why() {
        let details = vec![
            ("error", "org.blxrep.Error.Damaged".into()),
            ("message", "block 7 cannot be restored".into()),
            ("damage", vec!["block 7 of x.bak"].into()),
        ];
        let ended = ended(JobType::Restore, "failed", details);
        let failure = ended.failure(ACTION_RESTORE).unwrap();
        assert_eq!((failure.exit, ended.text().as_str()), (Exit::Damaged, ""));
        assert_snapshot!(failure, @r"
        block 7 cannot be restored
          block 7 of x.bak
        ");
        assert_snapshot!(ended.json(), @r#"{"damage":["block 7 of x.bak"],"error":"org.blxrep.Error.Damaged","job":7,"message":"block 7 cannot be restored","result":"failed","type":"restore"}"#);
    }

    #[test]
    fn a_job_that_was_canceled_or_ended_in_a_way_of_the_future() {
        let canceled = ended(JobType::Verify, "canceled", vec![]).failure("").unwrap();
        assert_eq!(canceled, Failure::failed("job 7 was canceled"));
        let odd = ended(JobType::Verify, "postponed", vec![]).failure("").unwrap();
        assert_eq!(odd, Failure::failed("job 7 ended as 'postponed'"));
    }
}
