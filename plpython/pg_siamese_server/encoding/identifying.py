"""Keywords of tags that identify a person. ``self_check`` reads them without a DICOM library."""

from __future__ import annotations

# Who is shown, or whom to ask for the name (PS3.15 table E.1-1, without UIDs and dates of studies).
IDENTIFYING = frozenset(
    (
        "AccessionNumber",
        "AdmissionID",
        "CountryOfResidence",
        "MilitaryRank",
        "NameOfPhysiciansReadingStudy",
        "OperatorsName",
        "OtherPatientIDs",
        "OtherPatientIDsSequence",
        "OtherPatientNames",
        "PatientAddress",
        "PatientBirthDate",
        "PatientBirthName",
        "PatientBirthTime",
        "PatientComments",
        "PatientID",
        "PatientInsurancePlanCodeSequence",
        "PatientMotherBirthName",
        "PatientName",
        "PatientReligiousPreference",
        "PatientTelecomInformation",
        "PatientTelephoneNumbers",
        "PerformingPhysicianName",
        "PersonAddress",
        "PersonName",
        "PersonTelephoneNumbers",
        "PhysiciansOfRecord",
        "ReferringPhysicianName",
        "ReferringPhysicianAddress",
        "ReferringPhysicianTelephoneNumbers",
        "RegionOfResidence",
        "RequestingPhysician",
        "ResponsiblePerson",
        "StudyID",
    )
)
