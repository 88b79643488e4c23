//! The sensors of the demo: recordings of five real ones, built into the command so that it runs
//! anywhere (`tests/fixtures/sensors/README.md` names their source).

/// A recorded sensor and the transport that its device uses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sensor {
    /// The id of its datasource.
    pub(super) id: &'static str,
    /// What people call it.
    pub(super) name: &'static str,
    /// How its device sends readings.
    pub(super) way: SensorTransport,
    csv: &'static str,
}

/// A protocol, and where in it the key is presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SensorTransport {
    /// MQTT 3.1.1, the key as user name.
    Mqtt311,
    /// MQTT 5, the key as user property of CONNECT.
    Mqtt5,
    /// HTTP, `Authorization: KEY`.
    HttpPlain,
    /// HTTP, `Authorization: Bearer KEY`.
    HttpBearer,
    /// HTTP, `X-API-Key: KEY`.
    HttpApiKey,
    /// NATS, the key in a header.
    Nats,
}

impl SensorTransport {
    /// Those that are always there.
    pub(super) const ALL: [SensorTransport; 5] = [
        SensorTransport::Mqtt311,
        SensorTransport::Mqtt5,
        SensorTransport::HttpPlain,
        SensorTransport::HttpBearer,
        SensorTransport::HttpApiKey,
    ];

    pub(super) fn describe(self) -> &'static str {
        match self {
            SensorTransport::Mqtt311 => "MQTT 3.1.1, key as user name",
            SensorTransport::Mqtt5 => "MQTT 5, key as user property",
            SensorTransport::HttpPlain => "HTTP, Authorization: KEY",
            SensorTransport::HttpBearer => "HTTP, Authorization: Bearer KEY",
            SensorTransport::HttpApiKey => "HTTP, X-API-Key: KEY",
            SensorTransport::Nats => "NATS, key as header",
        }
    }

    pub(super) fn is_mqtt(self) -> bool {
        matches!(self, SensorTransport::Mqtt311 | SensorTransport::Mqtt5)
    }
}

/// One line of a recording.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reading {
    /// Local time without a zone, as recorded.
    pub(super) timestamp: &'static str,
    /// The digits as recorded.
    pub(super) value: &'static str,
}

impl Reading {
    /// The message as JSON, with the value's digits as recorded.
    pub(super) fn payload(self) -> String {
        format!(r#"{{"timestamp": "{}", "value": {}}}"#, self.timestamp, self.value)
    }
}

impl Sensor {
    /// The recording, oldest first.
    pub(super) fn readings(&self) -> impl Iterator<Item = Reading> + Send + use<> {
        let lines = self.csv.lines().skip(1);
        lines.filter_map(|line| line.split_once(',')).map(|(timestamp, value)| Reading { timestamp, value })
    }
}

macro_rules! recording {
    ($file:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sensors/", $file))
    };
}

/// All five sensors.
pub(super) const SENSORS: [Sensor; 5] = [
    Sensor {
        id: "machine-temperature",
        name: "Machine temperature (°F), up to its failure",
        way: SensorTransport::Mqtt311,
        csv: recording!("machine_temperature_system_failure.csv"),
    },
    Sensor {
        id: "ambient-temperature",
        name: "Office ambient temperature (°F)",
        way: SensorTransport::Mqtt5,
        csv: recording!("ambient_temperature_system_failure.csv"),
    },
    Sensor {
        id: "lane-occupancy-6005",
        name: "Road sensor 6005: lane occupancy (%)",
        way: SensorTransport::HttpPlain,
        csv: recording!("occupancy_6005.csv"),
    },
    Sensor {
        id: "speed-6005",
        name: "Road sensor 6005: speed (mph)",
        way: SensorTransport::HttpBearer,
        csv: recording!("speed_6005.csv"),
    },
    Sensor {
        id: "travel-time-387",
        name: "Road segment 387: travel time (s)",
        way: SensorTransport::HttpApiKey,
        csv: recording!("TravelTime_387.csv"),
    },
];

/// The sensors as they are replayed; the last one over NATS, if there is one.
pub(super) fn sensors_with(nats: bool) -> [Sensor; 5] {
    let mut sensors = SENSORS;
    if nats && let Some(last) = sensors.last_mut() {
        last.way = SensorTransport::Nats;
    }
    sensors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recordings_hold_37342_readings_that_are_json() {
        let counts = SENSORS.map(|sensor| sensor.readings().count());
        assert_eq!(counts, [22_695, 7_267, 2_380, 2_500, 2_500]);
        assert_eq!(counts.iter().sum::<usize>(), 37_342);
        for reading in SENSORS.iter().flat_map(Sensor::readings) {
            let payload: serde_json::Value = serde_json::from_str(&reading.payload()).expect("JSON");
            assert_eq!(payload["timestamp"], reading.timestamp);
            assert!(payload["value"].is_number(), "{payload}");
        }
    }

    #[test]
    fn a_payload_keeps_the_recorded_digits() {
        let second = SENSORS[0].readings().nth(1).expect("there are many");
        assert_eq!(second.payload(), r#"{"timestamp": "2013-12-02 21:20:00", "value": 74.93588199999998}"#);
    }
}
